"""How the library is set up for a run, with which base optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import nusam
from tests.fuzz.trees import Functional, Net, Spec, matrices

SCHEDULES: dict[str, Callable[[int], float]] = {
    "none": lambda k: 1.0,
    "falling": lambda k: (k + 1) ** -0.5,
    "now and then": lambda k: float(k % 4 != 2),
}


@dataclass(frozen=True)
class Options:
    """Arguments of the library and of its base optimizer."""

    method: str = "NuSAM"
    ascent: str = "auto"
    placement: str = "auto"
    guarded: bool = True  # model= is given
    iterations: int = 1
    delay: int = 0
    schedule: str = "none"
    serves_small: bool = True  # whether "auto" serves matrices of any size
    frees: bool = False  # whether gradients that are compared go at once, as those of large models
    base: str = "SGD"
    maximize: bool = False
    later: bool = False  # whether the head joins the optimizer later
    groups: int = 1
    rho: float = 0.2
    seed: int = 0

    @property
    def rank_one(self) -> bool:
        return self.method in ("NuSAM", "NuSAMNorm")

    @property
    def needs_model(self) -> bool:
        return self.method == "SAMON" or (
            self.rank_one and (self.ascent == "matrix-free" or self.placement == "forward")
        )


class Chosen:
    """A predicate for targets=: what is trained and not left out."""

    def __init__(self, base: Optimizer, left_out: frozenset[str]) -> None:
        self.base, self.left_out = base, left_out

    def __call__(self, name: str, parameter: Tensor) -> bool:
        held = {id(p) for group in self.base.param_groups for p in group["params"]}
        return parameter.requires_grad and name not in self.left_out and id(parameter) in held


def of_head(model: Net) -> list[Tensor]:
    """What joins the optimizer later; a weight that is the table's too is there from the beginning."""
    return [p for name, p in model.named_parameters() if name.startswith("head.")]


def base_of(model: Net, options: Options, joined: bool) -> Optimizer:
    """The base optimizer, whose groups differ in their radius."""
    later = {id(p) for p in of_head(model)} if options.later else set()
    chosen = [p for p in model.parameters() if id(p) not in later]
    groups: list[dict[str, Any]] = [{"params": chosen, "rho": options.rho}]
    if options.groups == 2 and len(chosen) > 1:
        groups = [{"params": chosen[::2], "rho": options.rho}, {"params": chosen[1::2], "rho": options.rho / 2}]
    if joined and options.later:
        groups.append({"params": of_head(model), "rho": options.rho})
    if options.base == "SGD":
        return torch.optim.SGD(groups, lr=0.02, momentum=0.8, maximize=options.maximize)
    return torch.optim.AdamW(groups, lr=0.01, eps=1e-2, maximize=options.maximize)


def optimizer_of(
    model: Net, base: Optimizer, options: Options, placement: str, left_out: frozenset[str]
) -> nusam.SharpnessAware:
    given: dict[str, Any] = {"rho": options.rho, "delay": options.delay, "seed": options.seed}
    if options.schedule != "none":
        given["rho_schedule"] = SCHEDULES[options.schedule]
    if options.guarded or options.needs_model:
        given["model"] = model
    if options.rank_one:
        given |= {"power_iterations": options.iterations, "ascent": options.ascent, "placement": placement}
        if left_out:
            given["targets"] = Chosen(base, left_out)
    made: nusam.SharpnessAware = getattr(nusam, options.method)(base, **given)
    return made


def out_of_reach(model: Net, spec: Spec) -> frozenset[str]:
    """Matrices to which no forward of a layer can add an ε, as the documentation says."""
    found = {"table.weight"} if spec.table == "normed" else set()
    for name in matrices(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear | nn.Embedding | nn.MultiheadAttention):
            found.add(name)
    for name, module in model.named_modules():
        if isinstance(module, Functional) and module.how != "keyword":
            found.add(f"{name}.layer.weight")
        if type(module).__name__ == "Clamped":
            found.add(f"{name}.layer.weight")
    return frozenset(found)


options = st.builds(
    Options,
    method=st.sampled_from(["NuSAM"] * 5 + ["NuSAMNorm", "SAM", "SAMON"]),
    ascent=st.sampled_from(["auto", "auto", "gradient", "matrix-free", "matrix-free"]),
    placement=st.sampled_from(["auto", "weights", "forward", "forward"]),
    guarded=st.sampled_from([True] * 5 + [False]),
    iterations=st.sampled_from([1, 1, 1, 2, 3]),
    delay=st.sampled_from([0, 0, 0, 0, 1, 3]),
    schedule=st.sampled_from(["none", "none", *SCHEDULES]),
    serves_small=st.sampled_from([True, True, True, False]),
    frees=st.sampled_from([False, False, True]),
    base=st.sampled_from(["SGD", "AdamW"]),
    maximize=st.sampled_from([False, False, False, True]),
    later=st.booleans(),
    groups=st.integers(1, 2),
    rho=st.sampled_from([0.2, 0.05, 0.5]),
    seed=st.integers(0, 3),
)
