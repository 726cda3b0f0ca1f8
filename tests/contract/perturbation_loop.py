"""A loop whose step belongs to something else, as an engine's does: νSAM's passes without an optimizer around it."""

import torch
from torch import nn

import nusam
from nusam.lmo import Nuclear
from nusam.targets import mixed
from tests.contract.problem import RHO, Run, Trained, loader


class PerturbationLoop:
    can = frozenset({"accumulation", "resume", "share"})  # tests/test_perturbation.py has coarse precisions

    def train(self, run: Run) -> Trained:
        trained = Trained.start(run)
        model = trained.model
        base = trained.base()
        base.register_step_post_hook(trained.note)
        trained.opt = nusam.Perturbation(model, RHO, delay=run.delay, ascent_share=run.share)
        trained.opt.load_state_dict({**trained.opt.state_dict(), "matrices": warm_starts(model)})
        parts = {"model": model, "base": base, "schedule": trained.schedule(base), "opt": trained.opt}
        first = 0
        if run.resume:
            saved = torch.load(run.folder / "perturbation.pt")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            first = saved["epoch"]

        for _ in range(first, run.epochs):
            for number, batch in enumerate(loader(run), start=1):
                last = number % run.micro_batches == 0
                for part in trained.opt.passes(*batch, ends_step=last):
                    (model.loss(*part) / run.micro_batches).backward()
                if last:
                    if run.clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
                    base.step()
                    base.zero_grad()
                    parts["schedule"].step()

        if run.folder is not None and not run.resume:
            saved = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**saved, "epoch": run.epochs}, run.folder / "perturbation.pt")
        return trained


def warm_starts(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Those of the other loops, whose optimizers hold the matrices before all else."""
    matrices = [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim == 2]
    return {name: Nuclear().init_state(p, mixed(0, index)) for index, (name, p) in enumerate(matrices)}
