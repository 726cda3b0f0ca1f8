"""A training run in which every step of the library is held to the oracle's."""

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import nusam
from tests.fuzz import sentences
from tests.fuzz.comparison import Pair, said_of_epsilon
from tests.fuzz.oracle import DOUBTFUL, Oracle
from tests.fuzz.setting import SCHEDULES, Options, base_of, of_head, optimizer_of, out_of_reach
from tests.fuzz.tally import Outcome, Tally
from tests.fuzz.trees import Net, Spec, build, kinds, matrices
from tests.fuzz.tries import tried
from tests.fuzz.uses import Boom, Plan, can_run, run

ROUNDED = 1e-11  # a difference that would grow over many steps


class Trial:
    """Model and optimizer, and the oracle beside them.

    Args:
        spec: the model.
        options: the library's.
        plan: what a step's passes do, until it changes.
    """

    def __init__(self, spec: Spec, options: Options, plan: Plan) -> None:
        self.spec, self.plan = spec, plan if can_run(plan, spec) else Plan()
        self.at = 0
        self.told: set[str] = set()
        self.odd: set[str] = set()  # matrices that were used otherwise than by their layers, in any step
        self.hooks: dict[str, tuple[float, list[Any]]] = {}
        self.refused: set[str] = set()  # what was refused in the forward once
        self.saved: tuple[Any, ...] | None = None
        self.schedulers: list[Any] = []
        self.model = build(spec)
        self._set_up(options)
        if not self.oracle.radii():  # nothing to perturb is refused at once
            self._set_up(replace(options, method="NuSAM", placement="weights", later=False))
        self.patches = ExitStack()
        if options.serves_small:
            self.patches.enter_context(mock.patch("nusam.optimizer.WORTH_SERVING", 0))
        if options.frees:
            self.patches.enter_context(mock.patch("nusam.ascent.serving.LARGE", 1))
        self.pair = Pair(self.model, self.oracle.model)
        self.opt = self._optimizer()
        Tally.trials += 1

    def _set_up(self, options: Options) -> None:
        self.options, self.placement = options, options.placement
        self.joined = not options.later
        self.guarded = options.guarded or options.needs_model
        self.left_out = out_of_reach(self.model, self.spec) if self.in_forward else frozenset()
        twin = build(self.spec)
        base = base_of(twin, options, self.joined)
        self.oracle = Oracle(twin, base, options.method, options.iterations, self.guarded)
        self.oracle.delay = options.delay
        self.oracle.schedule = SCHEDULES[options.schedule]
        self.oracle.excluded = self.left_out

    def named(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.pair.names, self.pair.parameters, strict=True)

    @property
    def in_forward(self) -> bool:
        return self.placement == "forward" and self.options.rank_one

    def _optimizer(self) -> nusam.SharpnessAware:
        base = base_of(self.model, self.options, self.joined)
        return optimizer_of(self.model, base, self.options, self.placement, self.left_out)

    def close(self) -> None:
        self.patches.close()

    # ------------------------------------------------------------ steps

    def take(
        self,
        plan: Plan | None = None,
        how: str = "passes",
        micro: int = 1,
        fails: tuple[str, str] = ("", ""),
        beside: tuple[str, str] = ("", ""),
        updates: bool = True,
    ) -> None:
        """One step.

        Args:
            plan: what its passes do.
            how: "passes", "halves" or "closure".
            micro: how many micro-batches accumulate, each with passes of its own.
            fails: a pass, and where in it the loop raises.
            beside: a pass, and what the loop tries in it that must be refused.
            updates: whether the loop lets the base optimizer step.
        """
        plan = self.plan if plan is None else plan
        plan = plan if can_run(plan, self.spec) else Plan()
        self.odd |= plan.touched(self.model) | self.hooks.keys()
        self.at += 1
        Tally.steps += 1
        how = "passes" if micro > 1 else how
        for k in range(micro):
            at = 10 * self.at + k
            if not self._passes(plan, at, how, k > 0, fails if k == micro - 1 else ("", ""), beside):
                return
        if updates and how != "closure":
            self._update()
            self.oracle.update()
        self._hold("after the step")
        if self.pair.off > ROUNDED:
            Tally.realigned += 1
            self._take_over()

    def plain(self) -> bool:
        """A step of the base optimizer alone; whether it came to that."""
        self.at += 1
        Tally.steps += 1
        runs = True
        for model, opt in ((self.model, self.opt), (self.oracle.model, self.oracle.base)):
            self._seed(self.at)
            opt.zero_grad()
            try:
                self._run(model, self.plan, 10 * self.at, "plain")
            except RuntimeError:  # torch's own, of a program that it does not run
                runs = False
                opt.zero_grad()
        if runs:
            self._update()
            self.oracle.update()
        self._hold("after a plain step")
        return runs

    def _update(self) -> None:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            self.opt.step()
        for w in warned:
            known = (sentences.SMALL_REACH, sentences.NEVER_TAKEN, sentences.NO_PASSES)
            assert sentences.heard(str(w.message), *known), w.message

    def _seed(self, at: int) -> None:
        torch.default_generator.manual_seed(at)
        random.seed(at)

    def _run(self, model: Net, plan: Plan, at: int, name: str, fails: str = "") -> Tensor:
        if not self.joined:
            for p in of_head(model):
                p.grad = None  # nobody else clears what the optimizer doesn't hold
        return run(model, self.spec, plan, at, name, fails)

    def _passes(
        self, plan: Plan, at: int, how: str, accumulate: bool, fails: tuple[str, str], beside: tuple[str, str]
    ) -> bool:
        """The passes of one sample, by both; whether a step of the base may follow."""
        self.starts = {name: u.clone() for name, u in self.pair.warm_starts(self.opt).items()}
        for name, u in self.starts.items():
            self.oracle.u.setdefault(name, u)
        before = {name: p.detach().clone() for name, p in self.named()}
        addresses = [p.data_ptr() for p in self.pair.parameters]
        self._seed(at)
        found = self._by_library(plan, at, how, accumulate, fails, beside)
        drawn = random.random(), float(torch.rand(()))
        assert addresses == [p.data_ptr() for p in self.pair.parameters], "a parameter has moved in memory"
        said = self._listen(found.warned, plan, how)
        error = found.error
        if error is not None and sentences.is_ours(error):
            self._refused(str(error), plan, before)
            return False
        self._seed(at)
        metrics = self.opt.metrics()
        without = self._without(said, how, metrics)
        wrong: BaseException | None = None
        loss = None
        try:
            loss = self.oracle.passes(
                lambda model, name: self._run(model, plan, at, name, fails[1] * (name == fails[0])), accumulate, without
            )
        except (Boom, RuntimeError) as raised:  # torch's own, of a program that it does not run
            wrong = raised
        if type(wrong) is not type(error):
            raise AssertionError(f"the library raised {error!r}, and a loop by hand {wrong!r}") from error
        if error is None and how == "closure":
            assert loss is not None
            assert found.loss is not None
            self.oracle.update()
        if self._is_doubtful(found, metrics):
            Tally.doubted += 1
            self._take_over()
            return error is None
        assert drawn == (random.random(), float(torch.rand(()))), "a generator stands elsewhere"
        if loss is not None and found.loss is not None:
            assert torch.allclose(loss, found.loss, rtol=1e-9, atol=1e-9), f"the loss is {found.loss}, not {loss}"
        if error or not self.at % 3:  # else the step that follows is held to the oracle's, gradients and all
            self._hold(f"after {how}" + (f" that failed in the {fails[0]}" if error else ""))
        if error is None and "ascent" in found.passes:
            fault = said_of_epsilon(metrics, self._labels(), self.oracle)
            assert not fault, fault
        return error is None

    def _by_library(
        self, plan: Plan, at: int, how: str, accumulate: bool, fails: tuple[str, str], beside: tuple[str, str]
    ) -> Outcome:
        outcome = Outcome()

        def one(name: str) -> Tensor:
            outcome.passes.append(name)
            loss = self._run(self.model, plan, at, name, fails[1] * (name == fails[0]))
            if beside[0] == name and not (beside[1] == "evaluate" and self._writes):  # it would write, too
                has_epsilon = any(key.startswith("epsilon/") for key in self.opt.metrics())  # or the last ascent had
                perturbed = name == "descent" and self.opt.active and has_epsilon
                pattern = tried(beside[1], self.opt, self.model, perturbed and self.guarded)
                Tally.refusals.update([pattern] if pattern else [])
            if name == "ascent" or outcome.loss is None:
                outcome.loss = loss
            return loss

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                if how == "closure":
                    outcome.loss = self.opt.step(lambda: one(self.opt._pass))
                elif how == "halves":
                    if self.opt.active:
                        with self.opt.ascent():
                            one("ascent")
                    with self.opt.descent():
                        one("descent")
                else:
                    for name in self.opt.passes(accumulate=accumulate):
                        one(name)
            except (Boom, RuntimeError) as error:
                outcome.error = error
        outcome.warned = [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
        return outcome

    # ------------------------------------------------------------ what is held against what

    def _hold(self, when: str) -> None:
        fault = self.pair.difference(self.opt, self.oracle)
        assert not fault, f"step {self.at}, {when}: {fault}"

    def _labels(self) -> dict[str, str]:
        if self.guarded:
            return {name: name for name in self.pair.names}
        groups = enumerate(self.opt.param_groups)
        return {self.pair.name_of[id(p)]: f"{g}.{i}" for g, group in groups for i, p in enumerate(group["params"])}

    def _listen(self, warned: list[str], plan: Plan, how: str) -> list[sentences.Said]:
        """What was warned of, each of which must be due."""
        heard = []
        for sentence in warned:
            said = sentences.heard(sentence, *sentences.WARNINGS)
            assert said, f"warned: {sentence}"
            names = {name for name, label in self._labels().items() if label in said.names}
            if said.pattern == sentences.OTHERWISE:
                assert how == "halves", sentence
                assert names <= self.odd | self._called_repeatedly(plan), sentence
            if said.pattern == sentences.DESCENT_ONLY:
                assert any(when for when, _ in plan.off), sentence
            if said.pattern == sentences.NOT_ADDED:
                assert self.in_forward, sentence
                assert names <= self.odd, sentence
            if said.pattern == sentences.WRITTEN_LATE:  # of trained weights a copy is there in any step
                assert self._writes, sentence
                assert not any(self.model.get_parameter(name).requires_grad for name in said.names), sentence
            Tally.warned[said.pattern] += 1
            self.told |= names if said.pattern == sentences.OTHERWISE else set()
            heard.append(said)
        return heard

    def _called_repeatedly(self, plan: Plan) -> set[str]:
        """Matrices that a pass may use another number of times than other passes."""
        in_pieces = self.options.frees and "reentrant" in kinds(self.spec)  # of which the first is gone
        several = plan.forwards > 1 or plan.extras or self.plan != plan or in_pieces
        return set(matrices(self.model)) if several else set()

    def _without(self, said: list[sentences.Said], how: str, metrics: dict[str, float]) -> frozenset[str]:
        """What had no ε, as a warning of this step or an earlier one said."""
        labels = self._labels()
        now = {name for one in said if one.pattern == sentences.OTHERWISE for name in one.names}
        silent = self.told if how == "halves" else set()  # it was said once
        absent = {name for name in now | silent if f"epsilon/{labels[name]}" not in metrics}
        starts = self.pair.warm_starts(self.opt) if absent else {}
        return frozenset(name for name in absent if torch.equal(starts[name], self.starts[name]))

    def _refused(self, sentence: str, plan: Plan, before: dict[str, Tensor]) -> None:
        """A refusal must be due, and leave the weights as they were; then the loop does as it says."""
        said = sentences.heard(sentence, *sentences.REFUSALS)
        assert said, f"refused: {sentence}"
        Tally.refusals[said.pattern] += 1
        for name, p in self.named():
            ulp = torch.finfo(p.dtype).eps * (before[name].abs() + self.options.rho)
            assert ((p.detach() - before[name]).abs() <= ulp).all() or self._writes, f"{name} is perturbed: {sentence}"
        self._take_over()
        self._hold("after a refusal")
        if said.pattern == sentences.ASKS_IDLE:
            still = any(group["rho"] == 0 for group in self.opt.param_groups)
            others = self.left_out or not self.joined or still  # matrices that are no targets are as idle as a norm
            idle = {"asks idle", "asks all", *({"asks", "backward inputs"} if others else ())}
            assert plan.names & idle, sentence
        if said.pattern == sentences.UNREACHED:
            assert self.in_forward, sentence
            assert said.names <= self.odd, sentence
            if said.names <= self.refused:
                self._follow(said.names)
            self.refused |= said.names

    def _follow(self, names: frozenset[str]) -> None:
        """Exclude what was refused, or else put ε into the weights."""
        saved = self.opt.state_dict()
        if {name for name, _ in self.oracle.targets()} <= names:
            self.placement, self.left_out = "weights", frozenset()
        else:
            self.left_out |= names
        self.oracle.excluded = self.left_out
        self.opt = self._optimizer()
        self.opt.load_state_dict(saved)
        self.schedulers = []

    @property
    def _writes(self) -> bool:
        return "clamped" in kinds(self.spec) or self.spec.table == "normed"

    def _is_doubtful(self, found: Outcome, metrics: dict[str, float]) -> bool:
        """Whether ε of this step hangs on how sums are rounded."""
        if "ascent" not in found.passes:
            return False
        if self.oracle.doubt > DOUBTFUL:
            return True
        if any((G.T @ self.starts[name]).any() for name, G in self.oracle.restarted.items()):
            return True  # where one u is 0 on these rows, the other is rounding
        labels = self._labels()
        return any(
            (metrics.get(f"epsilon/{labels[name]}", 0.0) > 0) != (had > 0)
            and metrics.get(f"sigma/{labels[name]}", 1.0) < 1e-12
            for name, had in self.oracle.epsilon.items()
        )

    def _take_over(self) -> None:
        """Let the oracle go on from where the library stands."""
        twin, base = self.oracle.model, self.oracle.base
        twin.load_state_dict(self.model.state_dict())
        for module, other in zip(self.model.modules(), twin.modules(), strict=True):
            if hasattr(module, "calls"):
                other.calls = module.calls
        base.load_state_dict(copy.deepcopy(self.opt.base_optimizer.state_dict()))
        for p, q in zip(self.model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        self.oracle.u = {name: u.clone() for name, u in self.pair.warm_starts(self.opt).items()}
