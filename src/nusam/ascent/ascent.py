"""The ascent: from one pass over a sample to ε of every target, and what is remembered from step to step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.parts import part_of, shared_part
from nusam.ascent.record import Record
from nusam.ascent.serving import Serving, full_precision
from nusam.ascent.verification import ONE_USE, SEVERAL_USES
from nusam.distributed.blocks import complete, is_sharded, local, route
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.sums import Ranks
from nusam.lmo import L2, LMO, Nuclear, Perturbation, RankOne
from nusam.power_iteration import Matrix, TopPair, power_iteration
from nusam.targets import Target

__all__ = ["Ascent"]


class Ascent(Serving):
    """Finds ε by the weights' gradients, or from their layers."""

    def __init__(self, lmo: LMO, serve_from: int | None) -> None:
        super().__init__(lmo, serve_from)
        self.measured: dict[Tensor, dict[str, Tensor]] = {}  # what the metrics say of the last ε

    @torch.no_grad()
    def perturbations(
        self, targets: Sequence[Target], pass_: LayerPass | None, seed: int, workers: DataParallel
    ) -> dict[Tensor, Perturbation]:
        """ε of every target that the pass reached.

        Args:
            targets: what to perturb.
            pass_: the pass that served some of them without a gradient; the others have theirs in ``grad``.
            seed: for balls that draw.
            workers: the processes that share the pass.
        """
        if pass_ is not None and pass_.is_compiled:
            self._count_late(pass_)
        in_summands = workers.splits_the_batch and not workers.reduces_gradients(pass_ is not None)
        whole_pairs = pass_ is not None and not pass_.keeps
        sharded = any(is_sharded(target.parameter) for target in targets)
        with full_precision(target.parameter for target in targets):
            if in_summands and not isinstance(self.lmo, Nuclear):
                workers.average([target.parameter for target in targets])
                in_summands = False
            if in_summands or (sharded and not whole_pairs):
                found = self._from_parts(targets, pass_, workers, in_summands)
            else:
                found = self._from_here(targets, pass_, seed, sharded)
        self.measure(found)
        return found

    def measure(self, found: Mapping[Tensor, Perturbation]) -> None:
        """What the metrics say of a step's ε."""
        self.measured = {
            parameter: {"sigma": perturbation.sigma, "epsilon": perturbation.norm}
            if isinstance(perturbation, RankOne)
            else {"epsilon": perturbation.norm}
            for parameter, perturbation in found.items()
        }

    @contextmanager
    def only_compared(self) -> Iterator[None]:
        """Inside, an ascent is run for its comparisons: nothing else of it is remembered."""
        states, measured = {parameter: dict(state) for parameter, state in self.states.items()}, self.measured
        try:
            yield
        finally:
            self.states, self.measured = states, measured

    def _trusts(self, record: Record | None, *found: str) -> bool:
        """Whether what its layers found counts: always where served, where compared if it was known before too."""
        if record is None or not record.job.checks:
            return True
        return record.job.known and self.verification.of(record.parameter) in (found or (ONE_USE, SEVERAL_USES))

    def _from_here(
        self, targets: Sequence[Target], pass_: LayerPass | None, seed: int, sharded: bool
    ) -> dict[Tensor, Perturbation]:
        """All that is needed is in this process."""
        lmo = self.lmo
        if pass_ is None:
            reached = [target for target in targets if target.parameter.grad is not None]
            dense = [cast(Tensor, target.parameter.grad) for target in reached]
            states, radii = [self.state_of(target) for target in reached], [target.radius for target in reached]
            perturbations = lmo(dense, radii, states, seed) if reached else []
            return {target.parameter: epsilon for target, epsilon in zip(reached, perturbations, strict=True)}
        lmo = cast(Nuclear, lmo)
        records = pass_.records
        found: dict[Tensor, TopPair] = {}
        trusted = [p for p, r in records.items() if r.once and not r.job.keeps and self._trusts(r, ONE_USE)]
        if sharded:  # m-SAM: gradients are averaged over processes, the layers' pairs are this one's
            trusted = [p for p, r in records.items() if r.once and self.verification.of(p) in (ONE_USE, None)]
        found |= pass_.top_pairs(trusted)
        found |= {p: r.gradient_pair for p, r in records.items() if p not in found and r.gradient_pair is not None}
        gradients: dict[Tensor, Tensor | Matrix] = {}
        for target in targets:
            parameter = target.parameter
            record = records.get(parameter)
            gradient = part_of(parameter, record, self._trusts(record))
            if parameter not in found and gradient is not None:
                gradients[parameter] = gradient
        reached = [t for t in targets if t.parameter in found or t.parameter in gradients]
        if not reached:
            return {}
        if sharded and gradients:
            raise RuntimeError(
                "m_sam=True under FSDP2 needs every perturbed matrix to be served by its layer, and the gradient "
                f"of one of shape {tuple(next(iter(gradients)).shape)} was formed, which FSDP2 averages; exclude it "
                "with targets=, or use m_sam=False."
            )
        states = [self.state_of(target) for target in reached]
        radii = [target.radius for target in reached]
        us = [self.states[p]["u"] for p in gradients]
        iterated = power_iteration(list(gradients.values()), us, lmo.power_iterations)
        found |= dict(zip(gradients, iterated, strict=True))
        perturbations = lmo.from_pairs([found[target.parameter] for target in reached], radii, states)
        return {target.parameter: epsilon for target, epsilon in zip(reached, perturbations, strict=True)}

    def _from_parts(
        self, targets: Sequence[Target], pass_: LayerPass | None, workers: DataParallel, in_summands: bool
    ) -> dict[Tensor, Perturbation]:
        """Processes hold blocks or summands, and all of them go through the same list of targets.

        A gradient that is missing here may be there elsewhere, so it counts as zeros.
        """
        states = [self.state_of(target) for target in targets]
        radii = [target.radius for target in targets]
        gradients: list[Tensor | Matrix]
        if isinstance(self.lmo, Nuclear):
            records = pass_.records if pass_ else {}
            parts = []
            for parameter in (target.parameter for target in targets):
                record = records.get(parameter)
                parts.append(shared_part(parameter, record, self._trusts(record), workers, in_summands))
            gradients, routes = [matrix for matrix, _ in parts], [route_ for _, route_ in parts]
        else:
            shards = [complete(target.parameter.grad, target.parameter) for target in targets]
            gradients, routes = [local(gradient) for gradient in shards], [route(gradient) for gradient in shards]
        lmo = cast(L2 | Nuclear, self.lmo)  # those that see shards
        perturbations = lmo(gradients, radii, states, 0, Ranks(routes))  # type: ignore[arg-type]
        return {target.parameter: epsilon for target, epsilon in zip(targets, perturbations, strict=True)}
