"""Lightning's Trainer, automatic optimization."""

import pytorch_lightning as pl
from pytorch_lightning.plugins import MixedPrecision

from nusam.integrations.lightning import SharpnessAwareCallback
from tests.contract.problem import Run, Trained, loader, scaler


class Module(pl.LightningModule):
    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.net = trained.model
        self.trained = trained

    def training_step(self, batch, batch_idx):
        loss = self.net.loss(*batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        opt = self.trained.wrap(self.trained.base(), self)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": self.trained.schedule(opt), "interval": "step"}}


class LightningLoop:
    can = frozenset({"accumulation", "bfloat16", "float16", "resume", "share", "one pass"})

    def train(self, run: Run) -> Trained:
        trained = Trained.start(run)
        half = run.precision == "float16"
        # Lightning would look for a GPU: the plugin is handed over with a scaler for the CPU
        plugins = [MixedPrecision("16-mixed", "cpu", scaler(run))] if half else None
        trainer = trainer_on_cpu(
            plugins=plugins,
            precision="bf16-mixed" if run.precision == "bfloat16" else None,
            max_epochs=run.epochs,
            accumulate_grad_batches=run.micro_batches,
            gradient_clip_val=run.clip,
            one_pass=run.one_pass,
        )
        checkpoint = None if run.folder is None else run.folder / "lightning.ckpt"
        trainer.fit(Module(trained), loader(run), ckpt_path=checkpoint if run.resume else None)
        if run.folder is not None and not run.resume:
            trainer.save_checkpoint(checkpoint)
        return trained


def trainer_on_cpu(one_pass: bool = False, **options) -> pl.Trainer:
    """A Trainer that writes nothing, with the callback."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [SharpnessAwareCallback(one_pass)]
    return pl.Trainer(accelerator="cpu", callbacks=callbacks, **{"devices": 1, **quiet, **options})
