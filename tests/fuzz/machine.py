"""Random runs, which hypothesis draws and shrinks."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.fuzz.doings import Run
from tests.fuzz.setting import Options, options
from tests.fuzz.tally import Tally
from tests.fuzz.trees import Spec, specs
from tests.fuzz.uses import Extra, Plan, extras, plans

HOWS = st.sampled_from(["passes", "passes", "closure", "halves"])
PASSES = st.sampled_from(["ascent", "descent"])
WHERE = st.sampled_from(["before", "between", "inside", "after"])
AFTERWARDS = st.integers(0, 3)
TRIES = ["save the model", "evaluate", "save", "load", "step", "copy", "add", "nest", "ascend"]


def done(method):
    """Count it, and train on for some steps after it."""

    def counted(self, then, **drawn):
        Tally.doings[method.__name__] += 1
        method(self, **drawn)
        for _ in range(then):
            self.run.take()

    counted.__name__ = method.__name__
    return counted


class Machine(RuleBasedStateMachine):
    """Every rule is something that a training loop does."""

    run: Run | None = None

    @initialize(spec=specs, options=options, plan=plans)
    def begin(self, spec: Spec, options: Options, plan: Plan) -> None:
        self.run = Run(spec, options, plan)

    def teardown(self) -> None:
        if self.run is not None:
            self.run.close()

    # ------------------------------------------------------------ steps

    @rule(then=AFTERWARDS, steps=st.integers(1, 6), how=HOWS)
    @done
    def train(self, steps, how):
        for _ in range(steps):
            self.run.take(how=how)

    @rule(then=AFTERWARDS, micro=st.integers(2, 3), steps=st.integers(1, 3))
    @done
    def accumulate(self, micro, steps):
        for _ in range(steps):
            self.run.take(micro=micro)

    @rule(then=AFTERWARDS, extra=extras, how=HOWS, steps=st.integers(1, 2))
    @done
    def do_otherwise(self, extra: Extra, how, steps):
        for _ in range(steps):
            self.run.take(self.run.plan.beside(extra), how=how)

    @rule(then=AFTERWARDS, plan=plans, how=HOWS)
    @done
    def do_something_else(self, plan, how):
        self.run.take(plan, how=how)

    @rule(then=AFTERWARDS, plan=plans)
    @done
    def change_plan(self, plan):
        self.run.plan_anew(plan)

    @rule(then=AFTERWARDS, which=PASSES, index=st.integers(0, 3), how=HOWS)
    @done
    def leave_out_in_one_pass(self, which, index, how):
        self.run.take(Plan(off=((which, index),)), how=how)

    @rule(
        then=AFTERWARDS,
        which=PASSES,
        where=WHERE,
        how=HOWS,
        again=st.booleans(),
    )
    @done
    def fail(self, which, where, how, again):
        self.run.take(fails=(which, where), how=how)
        if again:
            self.run.take(how=how)

    @rule(then=AFTERWARDS, which=PASSES, what=st.sampled_from(TRIES), how=HOWS)
    @done
    def try_what_is_refused(self, which, what, how):
        self.run.take(beside=(which, what), how=how)

    @rule(then=AFTERWARDS, strange=st.sampled_from(["zero", "infinite"]))
    @done
    def meet_a_strange_loss(self, strange):
        self.run.take(Plan(extras=((strange, 0),)), updates=strange == "zero")

    @rule(then=AFTERWARDS)
    @done
    def leave_out_the_update(self):
        self.run.take(updates=False)

    @rule(then=AFTERWARDS)
    @done
    def step_without_passes(self):
        self.run.plain()

    # ------------------------------------------------------------ between steps

    @rule(then=AFTERWARDS, index=st.integers(0, 20), whole=st.booleans(), trained=st.booleans())
    @done
    def freeze(self, index, whole, trained):
        self.run.freeze(index, whole, trained)

    @rule(then=AFTERWARDS, training=st.booleans(), norms_only=st.booleans())
    @done
    def mode(self, training, norms_only):
        self.run.mode(training, norms_only)

    @rule(then=AFTERWARDS, group=st.integers(0, 2), rho=st.sampled_from([0.1, 0.3, 0.0]))
    @done
    def radius(self, group, rho):
        self.run.radius(group, rho)

    @rule(then=AFTERWARDS)
    @done
    def slow_down(self):
        self.run.slow_down()

    @rule(then=AFTERWARDS, rho=st.sampled_from([0.2, 0.0]))
    @done
    def join(self, rho):
        self.run.join(rho)

    @rule(then=AFTERWARDS, index=st.integers(0, 20), factor=st.sampled_from([0.5, -1.0]))
    @done
    def hook(self, index, factor):
        self.run.hook(index, factor)

    @rule(then=AFTERWARDS, how=st.sampled_from(["anew", "elsewhere", "copied", "alone"]))
    @done
    def resume(self, how):
        self.run.resume(how)

    @rule(then=AFTERWARDS)
    @done
    def save(self):
        self.run.save()

    @rule(then=AFTERWARDS)
    @done
    def go_back(self):
        self.run.go_back()
