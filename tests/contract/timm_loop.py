"""timm's train.py as docs/timm.md changes it, with timm's own factory, task, scaler, schedule and checkpoints."""

from contextlib import nullcontext

import torch
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, NativeScaler
from torch import nn

from nusam.integrations.timm import update
from tests.contract import problem
from tests.contract.problem import BATCHES, LR, MOMENTUM, RHO, Run, Trained, loader


class TimmLoop:
    can = frozenset({"accumulation", "bfloat16", "float16", "resume", "share"})

    def train(self, run: Run) -> Trained:
        trained = Trained.start(run)
        model = trained.model
        groups = [{"params": group["params"]} for group in trained.base().param_groups]  # in the others' order
        opt = trained.opt = create_optimizer_v2(
            model,
            "nusam-momentum",
            lr=LR,
            momentum=MOMENTUM,
            param_group_fn=lambda _: groups,
            rho=RHO,
            delay=run.delay,
            ascent_share=run.share,
            model=model,
        )
        opt.register_step_post_hook(trained.note)
        schedule, _ = create_scheduler_v2(
            opt,
            "poly" if run.schedule else "none",
            num_epochs=run.epochs,
            decay_rate=1.0,  # the power of its polynomial
            step_on_epochs=False,
            updates_per_epoch=BATCHES,
        )
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        scaler = None
        if run.precision == "float16":
            scaler = NativeScaler("cpu")
            scaler._scaler = problem.scaler(run)
        dtype = getattr(torch, run.precision)
        first = 0
        if run.resume:
            first = resume_checkpoint(model, str(run.folder / "last.pth.tar"), opt, scaler, log_info=False)

        updates = first * BATCHES
        for _ in range(first, run.epochs):
            for batch, (x, y) in enumerate(loader(run), start=1):
                for xs, ys in opt.passes(x, y, accumulate=run.micro_batches > 1):
                    with torch.autocast("cpu", dtype) if dtype.itemsize < 4 else nullcontext():
                        loss = task(xs, ys)["loss"] / run.micro_batches
                    if scaler is None:
                        loss.backward()
                    else:
                        scaler(loss, opt, need_update=False)
                if batch % run.micro_batches == 0:
                    update(opt, scaler, clip_grad=run.clip, parameters=model.parameters())
                    opt.zero_grad()
                    updates += 1
                    if schedule is not None:
                        schedule.step_update(updates)

        if run.folder is not None and not run.resume:
            folder = str(run.folder)
            saver = CheckpointSaver(model, opt, amp_scaler=scaler, checkpoint_dir=folder, recovery_dir=folder)
            saver.save_checkpoint(run.epochs - 1, metric=0.0)
        return trained
