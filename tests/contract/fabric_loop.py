"""Lightning's Fabric, a loop of one's own."""

from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch.nn.functional import cross_entropy

from tests.contract.problem import Run, Trained, loader, scaler


class FabricLoop:
    can = frozenset({"accumulation", "bfloat16", "float16", "resume", "share"})

    def train(self, run: Run) -> Trained:
        trained = Trained.start(run)
        half = run.precision == "float16"
        plugins = [MixedPrecision("16-mixed", "cpu", scaler(run))] if half else None
        precision = "bf16-mixed" if run.precision == "bfloat16" else None
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins, precision=precision)
        model = fabric.setup_module(trained.model)
        sam = trained.wrap(trained.base(), model)
        opt = fabric.setup_optimizers(sam)
        schedule = trained.schedule(sam)
        state = {"model": model, "opt": opt, "schedule": schedule, "epoch": 0}
        if run.resume:
            fabric.load(run.folder / "fabric.ckpt", state)

        for _ in range(state["epoch"], run.epochs):
            for index, (x, y) in enumerate(loader(run), start=1):
                for xs, ys in sam.passes(x, y, accumulate=True):
                    fabric.backward(cross_entropy(model(xs), ys) / run.micro_batches)
                if index % run.micro_batches == 0:
                    if run.clip is not None:
                        fabric.clip_gradients(model, opt, max_norm=run.clip, error_if_nonfinite=False)
                    opt.step()
                    opt.zero_grad()
                    schedule.step()

        if run.folder is not None and not run.resume:
            fabric.save(run.folder / "fabric.ckpt", {**state, "epoch": run.epochs})
        return trained
