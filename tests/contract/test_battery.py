"""The same assertions over every integration, each trained by the real framework.

A framework joins with a file ``NAME_loop.py`` beside this one: a class ``NameLoop`` with ``train(run)``, and
``can``, what it offers beyond steps, clipping, schedules and delays.
"""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_unperturbed
from tests.contract.plain_loop import PlainLoop
from tests.contract.problem import BATCHES, LR, RHO, Net, Run, Trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning on PyTorch 2.14
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]


HALF = 1e-4  # frameworks sum the norm in another order, or compute the loss in float32, and float16 rounds the rest


def loops():
    for path in sorted(Path(__file__).parent.glob("*_loop.py")):
        module = importlib.import_module(f"tests.contract.{path.stem}")
        for name, thing in vars(module).items():
            if name.endswith("Loop") and getattr(thing, "__module__", "") == module.__name__:
                yield thing()


LOOPS = list(loops())
OTHERS = [loop for loop in LOOPS if not isinstance(loop, PlainLoop)]


def each(loops, needs=None):
    able = [loop for loop in loops if needs is None or needs in loop.can]
    return pytest.mark.parametrize("loop", able, ids=[type(loop).__name__.removesuffix("Loop") for loop in able])


def distance(one, other):
    return max((a - b).abs().max() for a, b in zip(one.weights, other.weights, strict=True))


def assert_equal_runs(one, other, tolerance=1e-6):
    for a, b in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    assert one.model.through_layers == other.model.through_layers


def test_the_frameworks_are_here():
    names = {type(loop).__name__.removesuffix("Loop") for loop in LOOPS}
    assert {"Plain", "Closure", "Lightning", "Fabric", "Transformers", "Accelerate", "Perturbation"} <= names


def test_the_plain_loop_is_not_the_base_optimizer():
    """What the others equal must differ from training without a perturbation."""
    perturbed, bare = PlainLoop().train(Run()), PlainLoop().train(Run(delay=100))
    assert distance(perturbed, bare) > 1e-3


@each(OTHERS)
def test_twenty_steps_equal_the_plain_loop(loop):
    assert_equal_runs(loop.train(Run()), PlainLoop().train(Run()))


NUSAM_ALONE = ("TimmLoop", "PerturbationLoop")  # or with SAM and SAM-ON


@each([loop for loop in OTHERS if type(loop).__name__ not in NUSAM_ALONE])
@pytest.mark.parametrize("method", ["ASAM", "FriendlySAM", "GSAM", "LookSAM", "RWP", "SSAM"])
def test_other_methods_equal_the_plain_loop(loop, method):
    run = Run(steps=10, micro_batches=2 if "accumulation" in loop.can else 1, method=method)
    trained, plain = loop.train(run), PlainLoop().train(run)
    assert_equal_runs(trained, plain)
    assert trained.model.forwards == plain.model.forwards


@each(OTHERS)
def test_clipping_is_of_the_descent_gradient_once(loop):
    run = Run(clip=0.1)
    clipped = PlainLoop().train(run)
    assert (
        max((a - b).abs().max() for a, b in zip(clipped.weights, PlainLoop().train(Run()).weights, strict=True)) > 1e-3
    )
    assert_equal_runs(loop.train(run), clipped)


@each(OTHERS, needs="accumulation")
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_perturbs_every_micro_batch(loop, clip):
    run = Run(steps=10, micro_batches=3, clip=clip)
    trained = loop.train(run)
    assert_equal_runs(trained, PlainLoop().train(run))
    assert trained.model.forwards == 10 * 3 * 2
    assert len(trained.rates) == 10


@each(OTHERS, needs="bfloat16")
def test_bfloat16_equals_the_plain_loop(loop):
    run = Run(steps=10, precision="bfloat16", clip=0.5)
    assert_equal_runs(loop.train(run), PlainLoop().train(run), tolerance=HALF)


@each(OTHERS, needs="float16")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_float16_equals_the_plain_loop(loop, micro_batches):
    run = Run(steps=10, precision="float16", clip=0.5, micro_batches=micro_batches)
    assert_equal_runs(loop.train(run), PlainLoop().train(run), tolerance=HALF)


@each(LOOPS, needs="float16")
@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_overflow_skips_the_step_and_leaves_the_weights_unperturbed(loop, clip):
    run = Run(steps=10, precision="float16", clip=clip)
    assert len(loop.train(run).rates) == 10
    overflown = loop.train(replace(run, overflow=19))  # the last descent
    assert len(overflown.rates) == 9
    assert overflown.opt.state_dict()["param_groups"][0]["nusam_steps"] == 9
    assert_unperturbed(overflown.model, overflown.after[-1], RHO)


@each(OTHERS, needs="float16")
@pytest.mark.parametrize("overflow", [6, 7])
def test_training_goes_on_after_an_overflow(loop, overflow):
    run = Run(steps=10, precision="float16", overflow=overflow)
    trained = loop.train(run)
    assert len(trained.rates) == 10 - overflow % 2  # one in the ascent costs this step's perturbation alone
    assert_equal_runs(trained, PlainLoop().train(run), tolerance=HALF)


RUNS = {
    "the whole batch": (Run(steps=5), None),
    "a share": (Run(steps=5, share=0.5), "share"),
    "micro-batches": (Run(steps=5, micro_batches=2), "accumulation"),
    "one pass": (Run(steps=5, share=0.5, one_pass=True), "one pass"),
}


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
@pytest.mark.parametrize("fatal", [6, 7], ids=["ascent", "descent"])
@pytest.mark.parametrize("kind", [OverflowError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("loop", "run"),
    [
        pytest.param(loop, run, id=f"{type(loop).__name__.removesuffix('Loop')}, {name}")
        for loop in LOOPS
        for name, (run, needs) in RUNS.items()
        if needs is None or needs in loop.can
    ],
)
def test_who_handles_an_exception_finds_the_unperturbed_weights(loop, run, kind, fatal, monkeypatch):
    """While the exception is there, and with it every frame that it went through."""
    forward, start, started = Net.forward, Trained.start, []

    def failing(model, x):
        output = forward(model, x)
        if model.forwards == fatal + 1:
            raise kind
        return output

    monkeypatch.setattr(Net, "forward", failing)
    monkeypatch.setattr(Trained, "start", lambda *args: started.append(start(*args)) or started[-1])
    try:
        loop.train(run)
    except (kind, SystemExit):  # as Lightning leaves after a KeyboardInterrupt
        (trained,) = started
        assert_unperturbed(trained.model, trained.after[-1], RHO)
        trained.opt.state_dict()
    else:
        pytest.fail("the exception was lost")


@each(LOOPS, needs="resume")
@pytest.mark.parametrize("delay", [0, 13])
def test_resuming_is_bit_exact(loop, delay, tmp_path):
    whole = loop.train(Run(delay=delay))
    loop.train(Run(steps=10, delay=delay, folder=tmp_path))
    resumed = loop.train(Run(delay=delay, folder=tmp_path, resume=True))
    assert len(resumed.rates) == 10
    for a, b in zip(whole.weights, resumed.weights, strict=True):
        assert torch.equal(a, b)
    assert whole.states
    for name, state in whole.states.items():
        for key, value in state.items():
            assert torch.equal(value, resumed.states[name][key])


@each(LOOPS)
def test_a_delay_costs_one_pass_a_step(loop):
    assert loop.train(Run(delay=BATCHES, steps=BATCHES)).model.forwards == BATCHES
    assert loop.train(Run(delay=3, steps=10)).model.forwards == 3 + 2 * 7


@each(LOOPS)
def test_a_schedule_advances_once_a_step(loop):
    micro_batches = 2 if "accumulation" in loop.can else 1
    run = Run(steps=10, schedule=True, micro_batches=micro_batches)
    assert loop.train(run).rates == pytest.approx([LR * (1 - step / 10) for step in range(10)])


@each(OTHERS, needs="share")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_share_of_the_batch_equals_the_plain_loop(loop, micro_batches):
    """Ten steps: four without a perturbation, then an ascent on a quarter of every micro-batch."""
    run = Run(steps=10, delay=4, share=0.25, micro_batches=micro_batches, clip=0.5)
    plain = PlainLoop().train(run)
    assert distance(plain, PlainLoop().train(replace(run, share=1.0))) > 1e-4
    assert_equal_runs(loop.train(run), plain)


@each([loop for loop in OTHERS if "bfloat16" in loop.can], needs="share")
def test_a_share_in_half_precision(loop):
    for precision in ("bfloat16", "float16"):
        run = Run(steps=5, share=0.25, precision=precision)
        assert_equal_runs(loop.train(run), PlainLoop().train(run), tolerance=HALF)


@each(LOOPS, needs="share")
def test_resuming_with_a_share_is_bit_exact(loop, tmp_path):
    whole = loop.train(Run(steps=10, share=0.25))
    loop.train(Run(steps=5, share=0.25, folder=tmp_path))
    resumed = loop.train(Run(steps=10, share=0.25, folder=tmp_path, resume=True))
    for a, b in zip(whole.weights, resumed.weights, strict=True):
        assert torch.equal(a, b)


@each(OTHERS, needs="one pass")
@pytest.mark.parametrize("share", [1 / 4, 1 / 2])
def test_one_pass_equals_the_plain_loop(loop, share):
    run = Run(share=share, one_pass=True)
    plain = PlainLoop().train(run)
    assert plain.model.through_layers < 40  # of which some begin an epoch, or look
    assert distance(plain, PlainLoop().train(replace(run, one_pass=False))) > 1e-4
    assert_equal_runs(loop.train(run), plain)


@each(OTHERS, needs="one pass")
@pytest.mark.parametrize("clip", [None, 0.1])
def test_one_pass_carries_the_next_micro_batch(loop, clip):
    """Steps of three micro-batches, of which the first three have no perturbation."""
    run = Run(steps=10, delay=3, share=1 / 2, one_pass=True, micro_batches=3, clip=clip)
    trained = loop.train(run)
    assert_equal_runs(trained, PlainLoop().train(run))
    assert len(trained.rates) == 10


@each(OTHERS, needs="one pass")
def test_one_pass_in_bfloat16(loop):
    run = Run(steps=10, share=1 / 4, one_pass=True, precision="bfloat16", clip=0.5)
    trained = loop.train(run)
    assert not torch.is_autocast_enabled("cpu")
    assert_equal_runs(trained, PlainLoop().train(run), tolerance=HALF)


@each(LOOPS, needs="one pass")
def test_resuming_in_one_pass_is_bit_exact(loop, tmp_path):
    whole = loop.train(Run(steps=10, share=1 / 4, one_pass=True))
    loop.train(Run(steps=5, share=1 / 4, one_pass=True, folder=tmp_path))
    resumed = loop.train(Run(steps=10, share=1 / 4, one_pass=True, folder=tmp_path, resume=True))
    for a, b in zip(whole.weights, resumed.weights, strict=True):
        assert torch.equal(a, b)
