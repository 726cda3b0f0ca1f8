"""The loop of the README, which the others are compared with."""

from contextlib import nullcontext

import torch
from torch import nn

from tests.contract import problem
from tests.contract.problem import Run, Trained, loader


class PlainLoop:
    can = frozenset({"accumulation", "bfloat16", "float16", "resume", "share", "one pass"})

    def train(self, run: Run) -> Trained:
        trained = Trained.start(run)
        model = trained.model
        opt = trained.wrap(trained.base(), model)
        schedule = trained.schedule(opt)
        scaler = problem.scaler(run)
        dtype = getattr(torch, run.precision)
        first = 0
        if run.resume:
            saved = torch.load(run.folder / "plain.pt")
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["opt"])
            schedule.load_state_dict(saved["schedule"])
            scaler.load_state_dict(saved["scaler"])
            first = saved["epoch"]

        def loss(batch):
            with torch.autocast("cpu", dtype) if dtype.itemsize < 4 else nullcontext():
                return model.loss(*batch) / run.micro_batches

        def backward(loss):
            scaler.scale(loss).backward()

        def in_passes(batches):
            for batch in batches:
                for part in opt.passes(*batch, accumulate=True):
                    backward(loss(part))
                yield

        for _ in range(first, run.epochs):
            batches = loader(run)
            steps = opt.one_pass(batches, loss, backward=backward, accumulate=True) if run.one_pass else None
            for index, _ in enumerate(steps or in_passes(batches), start=1):
                if index % run.micro_batches == 0:
                    if run.clip is not None:
                        scaler.unscale_(opt)
                        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
                    scaler.step(opt)
                    scaler.update()
                    opt.zero_grad()
                    schedule.step()

        if run.folder is not None and not run.resume:
            state = {"model": model, "opt": opt, "schedule": schedule, "scaler": scaler}
            saved = {name: thing.state_dict() for name, thing in state.items()}
            torch.save({**saved, "epoch": run.epochs}, run.folder / "plain.pt")
        return trained
