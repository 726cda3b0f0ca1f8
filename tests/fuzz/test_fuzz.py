"""Random training runs, held to a loop by hand; and what such runs have found, each by the run that found it."""

import warnings
from unittest import mock

import pytest
import torch

from nusam.placement.ledger import Ledger
from tests.fuzz.doings import Run
from tests.fuzz.running import fuzz
from tests.fuzz.setting import Options
from tests.fuzz.tally import Tally
from tests.fuzz.trees import Spec
from tests.fuzz.uses import Plan

IN_FORWARD = Options(placement="forward")
LINEAR = ("linear", False)


@pytest.fixture
def start():
    """Begins a run; what is patched for it is put back."""
    runs = []

    def begin(spec, options=None, plan=None):
        runs.append(Run(spec, options or Options(), plan or Plan()))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def test_some_hundred_steps():
    fuzz(500)


@pytest.mark.slow
def test_ten_thousand_steps():
    before = Tally.steps, Tally.doubted
    fuzz(10_000, first=1_000)
    steps, doubted = Tally.steps - before[0], Tally.doubted - before[1]
    assert doubted < 0.05 * steps  # else the oracle would follow the library more than it judges


FAULTS = {
    "buffers-move-twice": ("nusam.guards.buffers._Step.finish", lambda self: None),
    "other-masks": ("nusam.guards.model_guard.RandomState.replay", lambda self: None),
    "surprises-are-missed": ("nusam.ascent.serving.Serving.surprises", lambda self, pass_: {}),
    "attacks-count": ("nusam.ascent.record.Record.accumulates", lambda self: True),
    "weights-stay-perturbed": ("nusam.placement.in_weights._RankOneInWeights.remove", lambda self: None),
    "hooks-are-overlooked": ("nusam.layers.structure.has_hooks", lambda parameter: False),
    "steps-are-not-saved": ("nusam.saving._STEPS", "elsewhere"),
}


FINDERS = {"buffers-move-twice": 2, "attacks-count": 1, "hooks-are-overlooked": 2}  # the first seeds that find them


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_found(fault):
    with mock.patch(*FAULTS[fault]), pytest.raises(Exception):  # noqa: B017, PT011
        fuzz(10_000, first=FINDERS.get(fault, 0), shrinks=False)


# ---------------------------------------------------------------- what was found


def test_a_group_may_join_while_no_radius_is_positive(start):
    run = start(Spec(2, LINEAR), Options(later=True))
    run.radius(0, 0.0)
    run.join(0.0)
    run.take()
    run.radius(1, 0.3)
    run.take()


def test_an_attention_whose_inputs_are_left_out_adds_epsilon_to_its_output(start):
    spec = Spec(2, ("seq", LINEAR, ("attention", "self"), LINEAR), table="plain")
    run = start(spec, IN_FORWARD, Plan(extras=(("outside", 2),)))  # the packed projection
    for _ in range(5):
        run.take()
    assert run.opt.metrics()["epsilon/body.1.inner.out_proj.weight"] > 0


@pytest.mark.parametrize("placement", ["auto", "forward"])
def test_a_frozen_table_is_renormalized_in_every_step(start, placement):
    run = start(Spec(2, LINEAR, table="normed"), Options(placement=placement))
    run.freeze(0, whole=False, trained=False)
    for _ in range(4):
        run.take()


def test_a_refused_ascent_leaves_nothing_to_the_next_descent(start):
    spec = Spec(2, ("seq", LINEAR, ("batch norm",), ("dropout",)))
    run = start(spec, Options(placement="forward", schedule="now and then"), Plan())
    run.take()
    run.hook(0, 0.5)
    run.take()  # is refused
    run.plain()
    run.take()  # has no ascent


def test_an_ascent_that_is_refused_when_it_is_run_again_leaves_no_warning_behind(start):
    run = start(Spec(2, LINEAR), Options(placement="forward", schedule="now and then"), Plan(extras=(("adapted", 0),)))
    run.take(Plan())
    run.take(updates=False)
    run.plain()
    run.take()


def test_what_is_said_of_a_matrix_does_not_hide_another_thing():
    ledger, weight = Ledger(), torch.ones(2, 2)

    def tell(what):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            ledger.tell([weight], lambda: {weight: "a"}, what)
        return [str(warning.message) for warning in heard]

    assert [tell(what) for what in ("is late", "is early", "is late")] == [["a is late."], ["a is early."], []]


def test_a_matrix_that_one_pass_alone_reached_is_named_again_when_it_is_used_otherwise(start):
    run = start(Spec(2, ("residual", LINEAR)))
    run.take()
    with mock.patch.object(run, "_without", wraps=run._without) as without:
        run.take(Plan(off=(("ascent", 0),)), how="halves")
        run.take()
        run.take(Plan(extras=(("outside", 0),)), how="halves")
    heard = [one.pattern for call in without.call_args_list for one in call.args[0]]
    assert len(heard) == 2
    assert heard[0] != heard[1]


@pytest.mark.parametrize("factor", [0.5, -1.0])
def test_a_hook_on_a_matrix_that_two_layers_share_is_refused_in_the_forward(start, factor):
    run = start(Spec(2, LINEAR, table="tied"), IN_FORWARD)
    run.take()
    run.hook(0, factor)
    for _ in range(3):
        run.take()
    assert run.refused == {"table.weight"}


@pytest.mark.parametrize("how", ["passes", "closure"])
def test_the_loss_of_a_step_is_that_of_the_ascent_which_counts(start, how):
    run = start(Spec(2, LINEAR))
    for _ in range(9):
        run.take()
    run.take(Plan(extras=(("asks", 0), ("slope penalty", 0))), how=how)


@pytest.mark.parametrize("kind", ["other", "apart"])
@pytest.mark.parametrize("options", [Options(), IN_FORWARD])
def test_an_attention_over_other_keys_is_perturbed_in_every_step(start, kind, options):
    run = start(Spec(3, ("attention", kind)), options)
    for how in ["halves"] * 6:
        run.take(how=how)
    assert not run.told


@pytest.mark.parametrize("extra", ["asks all", "backward inputs"])
def test_a_hook_on_a_bias_counts_where_its_gradient_is_asked_for(start, extra):
    run = start(Spec(2, ("linear", True)))
    for _ in range(9):
        run.take()
    run.hook(1, 0.5)
    run.take(Plan(extras=((extra, 0),)))


@pytest.mark.parametrize("beside", ["penalty", "outside", "row", "adapted"])
@pytest.mark.parametrize("asks", ["asks", "backward inputs"])
def test_a_gradient_that_is_asked_for_has_the_part_outside_of_the_layer(start, beside, asks):
    run = start(Spec(3, LINEAR))
    for _ in range(9):
        run.take()
    run.take(Plan(extras=((beside, 0), (asks, 0))))
    run.take(Plan(extras=((beside, 0), (asks, 0))), how="halves")


def test_a_matrix_that_is_left_out_is_idle(start):
    run = start(Spec(2, LINEAR), IN_FORWARD)
    outside = Plan(extras=(("outside", 0),))
    for _ in range(6):  # is refused, excluded, and from then on its layer forms no gradient in an ascent
        run.take(outside)
    run.take(Plan(extras=(("asks", 0),)))


def test_a_matrix_that_the_optimizer_does_not_hold_is_idle(start):
    run = start(Spec(2, ("linear", True)), Options(later=True), Plan(extras=(("backward inputs", 0),)))
    run.take(Plan())
    run.take()


def test_a_matrix_in_a_group_without_a_radius_is_idle(start):
    run = start(Spec(2, LINEAR), Options(serves_small=True, later=True))
    run.join(0.0)
    run.take()
    run.take(Plan(extras=(("backward inputs", 0),)))


@pytest.mark.parametrize("method", ["NuSAM", "SAM", "SAMON"])
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("first", ["reached", "not reached"])
def test_a_layer_that_the_descent_alone_reaches_may_write_its_weight(start, first, before, method):
    run = start(Spec(2, ("seq", ("residual", ("clamped",)), ("layer norm",))), Options(method=method))
    for _ in range(before):
        run.take(Plan(off=(("", 0),)) if first == "not reached" else None)
    run.take(Plan(off=(("ascent", 0),)))
    run.take()


@pytest.mark.parametrize("how", ["halves", "passes"])
def test_a_large_matrix_in_two_reentrant_checkpoints_is_named_where_the_ascent_can_not_be_repeated(start, how):
    run = start(Spec(2, ("twice", ("reentrant", LINEAR))), Options(frees=True))
    for _ in range(3):
        run.take(how=how)
    assert bool(run.told) == (how == "halves")


@pytest.mark.parametrize("options", [Options(), IN_FORWARD])
def test_a_gradient_that_cancels_says_nothing_of_a_matrix(start, options):
    run = start(Spec(2, ("batch norm",), table="plain"), options)  # the gradients of a batch norm's input add up to 0
    for _ in range(6):
        run.take()
    assert not run.refused


def test_a_frozen_weight_that_the_descent_alone_writes_keeps_that(start):
    run = start(Spec(2, ("residual", ("clamped",)), ""))
    run.freeze(0, whole=False, trained=False)
    run.take(Plan(off=(("ascent", 0),)))
    run.take()
