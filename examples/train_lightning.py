"""A small MLP-Mixer on digits with νSAM in Lightning's Trainer.

python examples/train_lightning.py --precision bf16-mixed --accumulate 2 --clip 1.0
torchrun --nproc-per-node 2 examples/train_lightning.py --devices 2
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from timm.models import MlpMixer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import nusam
from nusam.integrations.lightning import SharpnessAwareCallback


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = MlpMixer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, num_blocks=2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self.mixer(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.mixer(x).argmax(1) == y).float().mean(), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        now = self.trainer.callback_metrics
        self.print(f"epoch {self.current_epoch}: loss {now['loss']:.6f}, gap {now.get('sharpness_gap', 0.0):.6f}")
        self.log_dict(self.optimizers().metrics())  # every matrix: the size of its perturbation, its gradient's top σ

    def configure_optimizers(self):
        base = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)
        steps = self.trainer.estimated_stepping_batches
        opt = nusam.NuSAM(base, rho=0.02, delay=int(0.1 * steps), model=self)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"), help="where checkpoints and logs go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="32-true", help="or bf16-mixed, 16-mixed (on a GPU)")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    args = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)
    train, test = random_split(data, [1000, len(data) - 1000])
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip,
        devices=args.devices,
        callbacks=[SharpnessAwareCallback(), ModelCheckpoint(args.folder / "checkpoints", save_last=True)],
        default_root_dir=args.folder,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Classifier(),
        DataLoader(train, batch_size=50, shuffle=True),
        DataLoader(test, batch_size=200),
        ckpt_path=args.resume,
    )
    if trainer.is_global_zero:
        print(f"test accuracy {trainer.callback_metrics['accuracy']:.1%}")


if __name__ == "__main__":
    main()
