"""The ascent: from one pass over a sample to ε of every target, and what is remembered from step to step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from nusam.ascent.layer_pass import LayerPass
from nusam.ascent.parts import part_of, shared_part
from nusam.ascent.record import Record
from nusam.ascent.serving import Remembers, Serving, full_precision
from nusam.ascent.verification import ONE_USE, SEVERAL_USES
from nusam.directions import Direction
from nusam.distributed.blocks import complete, is_sharded, local, local_state, route
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.sums import Ranks
from nusam.lmo import LMO, Epsilon, Nuclear, RankOne, State
from nusam.power_iteration import ALONE, Matrix, Together, power_iteration
from nusam.targets import Target

__all__ = ["Ascent"]


class Ascent(Serving):
    """Finds ε by the weights' gradients, or from their layers.

    Args:
        lmo: the norm ball.
        serve_from: entries from which a matrix is served by its layer; None if none is.
        direction: what the ball maximizes against.
        remembers: what else has a state for every parameter.
        apart: whether the parameters themselves take part in no backward.
    """

    def __init__(
        self,
        lmo: LMO,
        serve_from: int | None,
        direction: Direction | None = None,
        remembers: Sequence[Remembers] = (),
        apart: bool = False,
    ) -> None:
        self.direction = direction or Direction()
        super().__init__(lmo, serve_from, [self.direction, *remembers], apart)
        self.measured: dict[Tensor, dict[str, Tensor]] = {}  # what the metrics say of the last ε

    @torch.no_grad()
    def perturbations(
        self,
        targets: Sequence[Target],
        pass_: LayerPass | None,
        seed: int,
        workers: DataParallel,
        age: int = 0,
        keep: Callable[[], None] = lambda: None,
    ) -> dict[Tensor, Epsilon]:
        """ε of every target that the pass reached.

        Args:
            targets: what to perturb.
            pass_: the pass that served some of them without a gradient; the others have theirs in ``grad``.
            seed: for balls that draw.
            workers: the processes that share the pass.
            age: steps since the delay.
            keep: called once the gradients are those of all processes, before a ball overwrites them.
        """
        if pass_ is not None and pass_.is_compiled:
            self._count_late(pass_)
        in_summands = workers.splits_the_batch and not workers.reduces_gradients(pass_ is not None)
        whole_pairs = pass_ is not None and not pass_.keeps
        parameters = [target.parameter for target in targets]
        sharded = any(map(is_sharded, parameters))
        with full_precision(parameters):
            if in_summands and not isinstance(self.lmo, Nuclear):
                workers.average(parameters)
                in_summands = False
            keep()
            stacks: list[Target] = []
            if self.stacks:
                stacks = [target for target in targets if target.parameter in self.stacks]
                targets = [target for target in targets if target.parameter not in self.stacks]
            if stacks and in_summands:
                workers.average([target.parameter for target in stacks])
            if in_summands or (sharded and not whole_pairs):
                found = self._from_parts(targets, pass_, workers, in_summands, age)
            else:
                found = self._from_here(targets, pass_, seed, sharded, age)
            found |= self._of_stacks(stacks)
        self.measure(found)
        return found

    @torch.no_grad()
    def drawn(self, targets: Sequence[Target], seed: int, age: int) -> dict[Tensor, Epsilon]:
        """ε of a direction that needs no gradient."""
        with full_precision(target.parameter for target in targets):
            found = self._in_the_ball([], targets, seed, age, ALONE)
        self.measure(found)
        return found

    def _in_the_ball(
        self, gradients: Sequence[Tensor], targets: Sequence[Target], seed: int, age: int, together: Together
    ) -> dict[Tensor, Epsilon]:
        """direction → ball → shape, of what is here of each target."""
        if not targets:
            return {}
        states, radii = [self.state_of(target) for target in targets], [target.radius for target in targets]
        more = (together,) if self.lmo.sees_shards else ()
        if type(self.direction) is Direction:  # the gradient itself
            epsilons = self.lmo(gradients, radii, states, seed, *more)
        else:
            parameters = [local(target.parameter).detach() for target in targets]
            here = [local_state(state) for state in states]
            directed = self.direction.of(gradients, parameters, here, age, seed)
            epsilons = self.lmo(directed, radii, states, seed, *more)
            epsilons = self.direction.shaped(epsilons, parameters, here, together)
        return {target.parameter: epsilon for target, epsilon in zip(targets, epsilons, strict=True)}

    def _of_stacks(self, targets: Sequence[Target]) -> dict[Tensor, Epsilon]:
        """ε of every matrix of a stack, by its gradient; 0 for that of an expert without one."""
        found: dict[Tensor, Epsilon] = {}
        for target in targets:
            gradient, state = target.parameter.grad, self.state_of(target)
            if gradient is not None:
                rows: list[State] = [{"u": u} for u in state["u"]]
                epsilons = self.lmo(list(gradient), [target.radius] * len(rows), rows, 0)
                us, vs, sigmas, norms = map(torch.stack, zip(*cast(list[RankOne], epsilons), strict=True))
                state["u"] = us
                found[target.parameter] = RankOne(us, vs, sigmas.amax(), torch.linalg.vector_norm(norms))
        return found

    def measure(self, found: Mapping[Tensor, Epsilon]) -> None:
        """What the metrics say of a step's ε."""
        self.measured = {
            parameter: {"sigma": perturbation.sigma, "epsilon": perturbation.norm}
            if type(perturbation) is RankOne
            else {"epsilon": perturbation.norm}
            for parameter, perturbation in found.items()
        }

    @contextmanager
    def only_compared(self) -> Iterator[None]:
        """Inside, an ascent is run for its comparisons: nothing else of it is remembered."""
        states, measured = self.copied_states(), self.measured
        try:
            yield
        finally:
            self.states, self.measured = states, measured

    def _trusts(self, record: Record | None, *found: str) -> bool:
        """Whether what its layers found counts: always where served; where compared, if it would be and was before.

        So a step that compares, as the first one after a resume does, has the ε that it would have had otherwise.
        """
        if record is None or not record.job.checks:
            return True
        found = found or (ONE_USE, SEVERAL_USES)
        return record.job.serves and record.job.known and self.verification.of(record.parameter) in found

    def _from_here(
        self, targets: Sequence[Target], pass_: LayerPass | None, seed: int, sharded: bool, age: int
    ) -> dict[Tensor, Epsilon]:
        """All that is needed is in this process."""
        if pass_ is None:
            reached = [target for target in targets if target.parameter.grad is not None]
            if reached and self.direction.sees_zeros:
                reached = list(targets)
            dense = [complete(target.parameter.grad, target.parameter) for target in reached]
            return self._in_the_ball(dense, reached, seed, age, ALONE)
        lmo = cast(Nuclear, self.lmo)
        records = pass_.records
        found = dict(pass_.known)
        trusted = [p for p, r in records.items() if r.once and not r.job.keeps and self._trusts(r, ONE_USE)]
        if sharded:  # m-SAM: gradients are averaged over processes, the layers' pairs are this one's
            trusted = [p for p, r in records.items() if r.once and self.verification.of(p) in (ONE_USE, None)]
        found |= pass_.top_pairs(trusted)
        found |= {p: r.gradient_pair for p, r in records.items() if p not in found and r.gradient_pair is not None}
        gradients: dict[Tensor, Tensor | Matrix] = {}
        for target in targets:
            parameter = target.parameter
            if parameter in found:
                continue
            record = records.get(parameter)
            gradient = part_of(parameter, record, self._trusts(record))
            if gradient is not None:
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
        self, targets: Sequence[Target], pass_: LayerPass | None, workers: DataParallel, in_summands: bool, age: int
    ) -> dict[Tensor, Epsilon]:
        """Processes hold blocks or summands, and all of them go through the same list of targets.

        A gradient that is missing here may be there elsewhere, so it counts as zeros.
        """
        if not isinstance(self.lmo, Nuclear):
            shards = [complete(target.parameter.grad, target.parameter) for target in targets]
            return self._in_the_ball(list(map(local, shards)), targets, 0, age, Ranks(list(map(route, shards))))
        states = [self.state_of(target) for target in targets]
        radii = [target.radius for target in targets]
        records = pass_.records if pass_ else {}
        found = []
        for parameter in (target.parameter for target in targets):
            record = records.get(parameter)
            found.append(shared_part(parameter, record, self._trusts(record), workers, in_summands))
        perturbations = self.lmo([matrix for matrix, _ in found], radii, states, 0, Ranks([way for _, way in found]))
        return {target.parameter: epsilon for target, epsilon in zip(targets, perturbations, strict=True)}
