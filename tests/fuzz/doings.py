"""What happens to a run between its steps: saves, loads, copies, freezes, new groups, radii, modes, hooks."""

import copy
import io
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.comparison import Pair
from tests.fuzz.setting import base_of, of_head, optimizer_of
from tests.fuzz.trees import build
from tests.fuzz.trial import Trial
from tests.fuzz.uses import Plan, can_run

SLOWER = 0.9  # a scheduler's factor


class Run(Trial):
    """A trial whose model, optimizer and options change on the way. Every method does the same to the oracle."""

    def plan_anew(self, plan: Plan) -> None:
        """What a step does from now on."""
        if can_run(plan, self.spec):
            self.plan = plan

    def freeze(self, index: int, whole: bool, trained: bool) -> None:
        """Freeze or thaw a parameter, or all of its module's."""
        names = [name for name, _ in self.model.named_parameters()]
        chosen = names[index % len(names)]
        module = chosen.rpartition(".")[0]
        for name in names if whole else [chosen]:
            if name.rpartition(".")[0] == module and name not in self.hooks:
                for model in (self.model, self.oracle.model):
                    model.get_parameter(name).requires_grad_(trained)
        self._hold("after freezing")

    def mode(self, training: bool, norms_only: bool) -> None:
        """Training or evaluation mode, of all modules or of batch norms."""
        for model in (self.model, self.oracle.model):
            for module in model.modules():
                if not norms_only or "BatchNorm" in type(module).__name__:
                    module.training = training

    def radius(self, group: int, rho: float) -> None:
        for groups in (self.opt.param_groups, self.oracle.base.param_groups):
            groups[group % len(groups)]["rho"] = rho

    def slow_down(self) -> None:
        """A scheduler's step, after one of the optimizer."""
        if not self.schedulers:
            both = (self.opt, self.oracle.base)
            self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, SLOWER) for one in both]
            if not self.plain():
                self.schedulers = []
        for scheduler in self.schedulers:
            scheduler.step()
        self._hold("after a scheduler's step")

    def join(self, rho: float) -> None:
        """The head joins the optimizer."""
        if self.joined:
            return
        self.joined, self.saved = True, None
        for model, opt in ((self.model, self.opt), (self.oracle.model, self.oracle.base)):
            for p in of_head(model):
                p.grad = None
            opt.add_param_group({"params": of_head(model), "rho": rho})

    def hook(self, index: int, factor: float) -> None:
        """A hook on a weight's gradient; or none, if it has one."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        if not names:
            return
        name = names[index % len(names)]
        if name in self.hooks:
            for handle in self.hooks.pop(name)[1]:
                handle.remove()
        else:
            self.hooks[name] = (
                factor,
                [_scaled(m.get_parameter(name), factor) for m in (self.model, self.oracle.model)],
            )

    def resume(self, how: str) -> None:
        """Go on with another optimizer: "anew", "elsewhere" with another model, "copied", or from the base "alone"."""
        if not any(self.oracle.targets()):
            return  # a new optimizer that has nothing to perturb is refused
        if how == "copied" and not self.hooks:  # of which torch makes no copy
            self.model, self.opt = copy.deepcopy((self.model, self.opt))
            self.pair = Pair(self.model, self.oracle.model)
        else:
            saved = self.opt.state_dict()
            if how == "alone":
                saved = self.opt.base_optimizer.state_dict()
                for group in saved["param_groups"]:
                    group.pop("rho")
            if how == "elsewhere":
                self._move()
            radii = [group["rho"] for group in self.opt.param_groups]
            base = base_of(self.model, self.options, self.joined)
            self.opt = optimizer_of(self.model, base, self.options, self.placement, self.left_out)
            self.opt.load_state_dict(_written_and_read(saved))
            if how == "alone":
                self.oracle.steps, self.oracle.u = 0, {}
                for group, rho in zip(self.opt.param_groups, radii, strict=True):
                    group["rho"] = rho
            self.told = set()
        self.schedulers = []
        for p, q in zip(self.model.parameters(), self.oracle.model.parameters(), strict=True):
            p.grad = q.grad = None
        self._hold(f"after going on {how}")

    def _move(self) -> None:
        """What is saved of the model goes into a new one."""
        model = build(self.spec)
        model.load_state_dict(_written_and_read(self.model.state_dict()))
        for module, other in zip(self.model.modules(), model.modules(), strict=True):
            other.training = module.training
            for name in ("calls", "off"):
                if name in vars(module):
                    setattr(other, name, getattr(module, name))
        for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
            q.requires_grad_(p.requires_grad)
        for name, (factor, handles) in self.hooks.items():
            handles[0] = _scaled(model.get_parameter(name), factor)
        self.model = model
        self.pair = Pair(model, self.oracle.model)

    def save(self) -> None:
        """Remember everything as a checkpoint does."""
        calls = [getattr(module, "calls", None) for module in self.model.modules()]
        for name, u in self.pair.warm_starts(self.opt).items():
            self.oracle.u.setdefault(name, u.clone())
        ours = {"model": self.model.state_dict(), "opt": self.opt.state_dict()}
        twin, base = self.oracle.model, self.oracle.base
        theirs = {"model": twin.state_dict(), "opt": base.state_dict(), "u": self.oracle.u}
        self.saved = (_written_and_read(ours), copy.deepcopy(theirs), calls, self.oracle.steps)

    def go_back(self) -> None:
        """Load what was saved last into the model and the optimizer that there are."""
        if self.saved is None:
            self.save()
        assert self.saved is not None
        ours, theirs, calls, steps = self.saved
        twin = self.oracle.model
        self.model.load_state_dict(ours["model"])
        self.opt.load_state_dict(copy.deepcopy(ours["opt"]))
        twin.load_state_dict(theirs["model"])
        self.oracle.base.load_state_dict(copy.deepcopy(theirs["opt"]))
        self.oracle.steps = steps
        self.oracle.u = {name: u.clone() for name, u in theirs["u"].items()}
        for model in (self.model, twin):
            for module, count in zip(model.modules(), calls, strict=True):
                if count is not None:
                    module.calls = count
        for name, u in self.pair.warm_starts(self.opt).items():
            self.oracle.u.setdefault(name, u.clone())
        self._hold("after going back")


def _scaled(parameter: Tensor, factor: float) -> Any:
    return parameter.register_hook(lambda g: factor * g)


def _written_and_read(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
