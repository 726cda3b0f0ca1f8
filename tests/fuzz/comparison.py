"""How the library's model and optimizer differ from the oracle's after a step, if they do."""

from typing import Any

import torch
from torch import Tensor, nn

import nusam
from tests.fuzz.oracle import Oracle

TOLERANCE = 1e-9
NOT_FINITE = 1e300
HOOKS = [key for key in vars(nn.Module()) if key.endswith("_hooks")]
ENGINE = torch.autograd._engine_run_backward  # type: ignore[attr-defined]


class Pair:
    """The library's model and the oracle's, whose parts are listed once."""

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        self.model, self.twin = model, twin
        self.off = 0.0  # by how much they differed last, where that was little enough
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters, self.others = list(model.parameters()), list(twin.parameters())
        self.name_of = dict(zip(map(id, self.parameters), self.names, strict=True))
        self.other_of = dict(zip(map(id, self.others), self.names, strict=True))
        self.modules = list(zip(model.named_modules(), twin.modules(), strict=True))
        self.numbered = [(module, other) for (_, module), other in self.modules if hasattr(module, "calls")]
        self.with_buffers = [(name, module, other) for (name, module), other in self.modules if module._buffers]

    def warm_starts(self, opt: nusam.SharpnessAware) -> dict[str, Tensor]:
        """u of every matrix, as it would be saved."""
        saved = opt.state_dict()
        held = [self.name_of[id(p)] for group in opt.param_groups for p in group["params"]]
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        states = {name: saved["state"].get(key, {}) for name, key in zip(held, keys, strict=True)}
        outside = saved["param_groups"][0].get("nusam_outside", {})
        found = {name: state["nusam_u"] for name, state in states.items() if "nusam_u" in state}
        return found | {name: state["u"] for name, state in outside.items()}

    def difference(self, opt: nusam.SharpnessAware, oracle: Oracle) -> str:
        """Weights, buffers, gradients, flags, the base's state, warm starts, and what is left on modules."""
        ours, theirs = self._tensors(opt, oracle.base)
        off: list[float] = []
        numbers = [(module.calls, other.calls) for module, other in self.numbered]
        fault = (
            _of_tensors(ours, theirs, off)
            or ("" if all(a == b for a, b in numbers) else f"numbers: {numbers}")
            or _of_starts(self.warm_starts(opt), oracle.u, off)
            or self._left_behind()
        )
        self.off = max(off, default=0.0)
        return fault

    def _tensors(self, opt: Any, base: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ours: dict[str, Tensor] = {}
        theirs: dict[str, Tensor] = {}
        for found, parameters, holder in ((ours, self.parameters, opt), (theirs, self.others, base)):
            held = {id(p) for group in holder.param_groups for p in group["params"]}
            for name, p in zip(self.names, parameters, strict=True):
                found[f"weight {name}"] = p.detach()
                if p.grad is not None and id(p) in held:
                    found[f"gradient of {name}"] = p.grad
                for key, value in holder.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        found[f"base's {key} of {name}"] = value
        for name, module, other in self.with_buffers:
            for key, buffer in module._buffers.items():
                ours[f"buffer {name}.{key}"], theirs[f"buffer {name}.{key}"] = buffer, other._buffers[key]
        return ours, theirs

    def _left_behind(self) -> str:
        if torch.autograd._engine_run_backward is not ENGINE:  # type: ignore[attr-defined]
            return "left behind: autograd's engine is not torch's own"
        for (name, module), other in self.modules:
            mine, its = vars(module), vars(other)
            if mine.keys() != its.keys() or type(module) is not type(other):
                return f"left behind: {name} has {sorted(mine.keys() ^ its.keys())}"
            if mine["training"] != its["training"]:
                return f"left behind: {name} is in another mode"
            if any(len(mine[hooks]) != len(its[hooks]) for hooks in HOOKS):
                return f"left behind: {name} has other hooks"
        for name, p, q in zip(self.names, self.parameters, self.others, strict=True):
            if p.requires_grad != q.requires_grad:
                return f"left behind: requires_grad of {name} is {p.requires_grad}"
            if vars(p):
                return f"left behind: {name} has {sorted(vars(p))}"
            for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                if len(getattr(p, hooks) or ()) != len(getattr(q, hooks) or ()):
                    return f"left behind: {name} has other {hooks}"
        return ""


def _of_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], off: list[float]) -> str:
    if found.keys() != wanted.keys():
        return f"{sorted(found.keys() ^ wanted.keys())} are on one side only"
    a = torch.cat([t.flatten().double() for t in found.values()])
    b = torch.cat([wanted[name].flatten().double() for name in found])
    both = torch.stack([a, b])
    if not both.isfinite().all():
        both = both.nan_to_num(NOT_FINITE, NOT_FINITE, NOT_FINITE)  # an inf and a NaN are one to whoever skips the step
    if torch.allclose(*both, rtol=TOLERANCE, atol=TOLERANCE):
        off.append(float((both[0] - both[1]).abs().max()))
        return ""
    by = {
        name: float((t.double() - wanted[name].double()).nan_to_num(NOT_FINITE).abs().max())
        for name, t in found.items()
    }
    name = max(by, key=lambda name: by[name])
    return f"{name} is off by {by[name]:.1e}"


def _of_starts(found: dict[str, Tensor], wanted: dict[str, Tensor], off: list[float]) -> str:
    if missing := wanted.keys() - found.keys():
        return f"warm starts of {sorted(missing)} are gone"
    if wanted:
        a, b = torch.cat([found[name] for name in wanted]), torch.cat(list(wanted.values()))
        if not torch.allclose(a, b, rtol=0, atol=1e-8):
            by = {name: float((found[name] - u).abs().max()) for name, u in wanted.items()}
            return f"warm starts are off by {by}"
        off.append(float((a - b).abs().max()))
    return ""


def said_of_epsilon(metrics: dict[str, float], labels: dict[str, str], oracle: Oracle) -> str:
    """How ``metrics()`` differs from what the last step's ε was; ``labels`` are its names of the parameters."""
    for name, label in labels.items():
        said, had = metrics.get(f"epsilon/{label}"), oracle.epsilon.get(name)
        if said is None and (not had or name not in oracle.reached):
            continue
        if said is None or abs(said - (had or 0.0)) > 1e-5:
            return f"metrics() says that ε of {name} is {said}, and it is {had}"
        sigma = metrics.get(f"sigma/{label}")
        if sigma is not None and abs(sigma - oracle.sigma[name]) > 1e-5 * max(1.0, sigma):
            return f"metrics() says that sigma of {name} is {sigma}, and it is {oracle.sigma[name]}"
    return ""
