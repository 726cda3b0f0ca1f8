"""The ascent: from one pass over a sample to ε of every target, and what is remembered from step to step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nusam.interrupts import entered
from nusam.layers import find_uses
from nusam.lmo import L2, LMO, Nuclear, Perturbation, RankOne, State, matrix_shape
from nusam.matrix_free import MatrixFreeAscent, why_not_served
from nusam.power_iteration import Explicit, Matrix, power_iteration
from nusam.sharding import (
    Block,
    BlockOf,
    DataParallel,
    Ranks,
    averaged,
    block,
    complete,
    compute_device,
    is_sharded,
    local,
    route,
    whole,
)

__all__ = ["Ascent", "Target"]


class Target(NamedTuple):
    """A parameter to be perturbed in this step."""

    parameter: Tensor
    radius: float
    seed: int


class Ascent:
    """Finds ε by the weights' gradients, or from their layers.

    Args:
        lmo: the norm ball.
        serve_from: entries from which a matrix is served by its layer; None if none is.
    """

    def __init__(self, lmo: LMO, serve_from: int | None) -> None:
        self.lmo = lmo
        self.serve_from = serve_from
        self.states: dict[Tensor, State] = {}
        self.measured: dict[Tensor, dict[str, Tensor]] = {}
        self._needs_gradient: dict[Tensor, str] = {}  # for good, and why
        self._fell_back: dict[Tensor, str] = {}  # in the last pass
        self._counted: set[Tensor] = set()  # whose uses in a compiled graph were read once

    def state_of(self, target: Target) -> State:
        """What is remembered of the target, its warm start above all."""
        if target.parameter not in self.states:
            self.states[target.parameter] = self.lmo.init_state(target.parameter, target.seed)
        return self.states[target.parameter]

    @property
    def fallbacks(self) -> dict[Tensor, str]:
        """Matrices that their layer could not serve, and why."""
        return {**self._needs_gradient, **self._fell_back} if self.serve_from is not None else {}

    def matrix_free(
        self, model: nn.Module, targets: Sequence[Target], parameters: Sequence[Tensor], workers: DataParallel
    ) -> MatrixFreeAscent | None:
        """The pass that serves the targets from their layers, if there is anything to serve."""
        if self.serve_from is None or not targets:
            return None
        uses = list(find_uses(model))
        least = self.serve_from
        worth = [t for t in targets if matrix_shape(t.parameter).numel() >= least or not t.parameter.requires_grad]
        reasons = why_not_served(uses, [target.parameter for target in worth])
        if workers.must_reduce:
            workers.refuse_frozen([target.parameter for target in targets])
            reasons = {target.parameter: workers.why_it_must_reduce for target in worth}
        possible = any(target.parameter not in reasons for target in worth)
        reasons |= self._needs_gradient
        self._fell_back = {t.parameter: reasons[t.parameter] for t in worth if t.parameter in reasons}
        served = {t.parameter: self.state_of(t)["u"] for t in worth if t.parameter not in reasons}
        # What a process learned by itself must not decide whether it takes part in what all do together.
        if not (served or (possible and workers.splits_the_batch)):
            return None
        needed = served.keys() | {target.parameter for target in targets}
        idle = [parameter for parameter in parameters if parameter not in needed]
        iterations = cast(Nuclear, self.lmo).power_iterations
        in_blocks = any(workers.is_tensor_parallel(target.parameter) for target in targets)
        keeps = workers.splits_the_batch or in_blocks
        return MatrixFreeAscent(uses, served, iterations, idle, keeps)

    @torch.no_grad()
    def perturbations(
        self, targets: Sequence[Target], pass_: MatrixFreeAscent | None, seed: int, workers: DataParallel
    ) -> dict[Tensor, Perturbation]:
        """ε of every target that the pass reached.

        Args:
            targets: what to perturb.
            pass_: the pass that served some of them without a gradient; the others have theirs in ``grad``.
            seed: for balls that draw.
            workers: the processes that share the pass.
        """
        in_summands = workers.splits_the_batch and not workers.reduces_gradients(pass_ is not None)
        whole_pairs = pass_ is not None and not pass_.keeps
        sharded = any(is_sharded(target.parameter) for target in targets)
        with _full_precision(targets):
            if in_summands and not isinstance(self.lmo, Nuclear):
                workers.average([target.parameter for target in targets])
                in_summands = False
            if in_summands or (sharded and not whole_pairs):
                found = self._from_parts(targets, pass_, workers, in_summands)
            else:
                found = self._from_here(targets, pass_, seed)
        self.measured = {
            parameter: {"sigma": perturbation.sigma, "epsilon": perturbation.norm}
            if isinstance(perturbation, RankOne)
            else {"epsilon": perturbation.norm}
            for parameter, perturbation in found.items()
        }
        return found

    def learn(self, pass_: MatrixFreeAscent) -> dict[Tensor, str]:
        """Note which matrices their layers could not serve in a finished pass; those that never can, and why."""
        reasons = pass_.not_served()
        self._fell_back |= reasons
        never = {parameter: reason for parameter, reason in reasons.items() if "its layer" in reason}
        compiled, repeated = pass_.used_repeatedly_in_a_graph(self._counted)
        self._counted.update(compiled)
        again = {p: "used repeatedly in a graph" for p, is_so in zip(compiled, repeated, strict=True) if is_so}
        self._needs_gradient |= never | again
        return never

    def keep(self, found: dict[Tensor, Perturbation], targets: Sequence[Target]) -> None:
        """Remember ε as v per unit of radius, beside u, so that it is saved and follows ρ."""
        radii = {target.parameter: target.radius for target in targets}
        for state in self.states.values():
            state.pop("v", None)
        for parameter, perturbation in found.items():
            if isinstance(perturbation, RankOne):
                self.states[parameter]["v"] = perturbation.v / radii[parameter]

    @property
    def is_kept(self) -> bool:
        """Whether any ε was kept."""
        return any("v" in state for state in self.states.values())

    @torch.no_grad()
    def kept(self, targets: Sequence[Target]) -> dict[Tensor, Perturbation]:
        """ε of the last ascent, at the radii of this step."""
        kept: dict[Tensor, Perturbation] = {}
        for target in targets:
            state = self.states.get(target.parameter, {})
            if "v" in state:
                v = state["v"] * target.radius
                kept[target.parameter] = RankOne(state["u"], v, v.new_zeros(()), v.new_zeros(()))
        return kept

    def _from_here(
        self, targets: Sequence[Target], pass_: MatrixFreeAscent | None, seed: int
    ) -> dict[Tensor, Perturbation]:
        """All that is needed is in this process."""
        pairs = pass_.top_pairs() if pass_ else {}
        reached = [t for t in targets if t.parameter in pairs or t.parameter.grad is not None]
        if not reached:
            return {}
        states = [self.state_of(target) for target in reached]
        radii = [target.radius for target in reached]
        if pass_:
            lmo = cast(Nuclear, self.lmo)
            rest = [t.parameter for t in reached if t.parameter not in pairs]
            if any(is_sharded(parameter) for parameter in rest):
                raise RuntimeError(
                    "m_sam=True under FSDP2 needs every perturbed matrix to be served by its layer, and the gradient "
                    f"of one of shape {tuple(rest[0].shape)} was formed, which FSDP2 averages; exclude it with "
                    "targets=, or use m_sam=False."
                )
            gradients = [cast(Tensor, parameter.grad) for parameter in rest]
            us = [self.states[parameter]["u"] for parameter in rest]
            pairs |= dict(zip(rest, power_iteration(gradients, us, lmo.power_iterations), strict=True))
            perturbations = lmo.from_pairs([pairs[target.parameter] for target in reached], radii, states)
        else:
            gradients = [cast(Tensor, target.parameter.grad) for target in reached]
            perturbations = self.lmo(gradients, radii, states, seed)
        return {target.parameter: epsilon for target, epsilon in zip(reached, perturbations, strict=True)}

    def _from_parts(
        self, targets: Sequence[Target], pass_: MatrixFreeAscent | None, workers: DataParallel, in_summands: bool
    ) -> dict[Tensor, Perturbation]:
        """Processes hold blocks or summands, and all of them go through the same list of targets.

        A gradient that is missing here may be there elsewhere, so it counts as zeros.
        """
        states = [self.state_of(target) for target in targets]
        radii = [target.radius for target in targets]
        gradients: list[Tensor | Matrix]
        if isinstance(self.lmo, Nuclear):
            parts = [self._part(target.parameter, pass_, workers, in_summands) for target in targets]
            gradients = [BlockOf(matrix, block_) for matrix, block_ in parts]
            routes = [block_.route for _, block_ in parts]
        else:
            shards = [complete(target.parameter.grad, target.parameter) for target in targets]
            gradients, routes = [local(gradient) for gradient in shards], [route(gradient) for gradient in shards]
        lmo = cast(L2 | Nuclear, self.lmo)  # those that see shards
        perturbations = lmo(gradients, radii, states, 0, Ranks(routes))  # type: ignore[arg-type]
        return {target.parameter: epsilon for target, epsilon in zip(targets, perturbations, strict=True)}

    def _part(
        self, parameter: Tensor, pass_: MatrixFreeAscent | None, workers: DataParallel, in_summands: bool
    ) -> tuple[Matrix, Block]:
        """What is here of the parameter's gradient."""
        served, here = pass_.part(parameter) if pass_ else (None, None)
        if served is None or here is None:  # as the other processes see it, which may have reached its layer
            here = workers.block(parameter, in_layer=in_summands)
        gradient = parameter.grad
        if gradient is not None and is_sharded(gradient):
            G = local(gradient).to(self.states[parameter]["u"].dtype)
            here = block(gradient)
            return (Nothing(here) if served else Explicit(G)), here
        if served is None and gradient is not None:
            served, here = Explicit(gradient.to(self.states[parameter]["u"].dtype)), whole(matrix_shape(parameter))
        elif served is None or gradient is not None:
            # with a gradient beside the products, a matrix was also used outside its layer: neither is all of it
            served = Nothing(here)
        return served, averaged(here, workers.summands(parameter) if in_summands else ())


def _full_precision(targets: Sequence[Target]) -> AbstractContextManager[None]:
    """Whatever autocast surrounds the passes."""
    kinds = {d.type for t in targets for d in (t.parameter.device, compute_device(t.parameter))}
    return entered(*(torch.autocast(kind, enabled=False) for kind in kinds - {"meta"}))


class Nothing:
    """A block of zeros, where a process has nothing to add."""

    def __init__(self, block: Block) -> None:
        self.n, self.m = (len(range(*cut.indices(size))) for cut, size in zip(block[1:3], block.shape, strict=True))

    def matvec(self, v: Tensor) -> Tensor:
        return v.new_zeros(self.n)

    def rmatvec(self, u: Tensor) -> Tensor:
        return u.new_zeros(self.m)
