"""A perturbation under DeepSpeed in two processes equals νSAM in one, ends as it was resumed, and adds two sums."""

import pytest

from tests.engines.launching import NEEDS_DEEPSPEED, said_by

pytestmark = NEEDS_DEEPSPEED
CASES = [
    "ZeRO 0",
    "ZeRO 0, accumulation",
    "ZeRO 1, accumulation",
    "ZeRO 2, accumulation, offload",
    "ZeRO 3",
    "ZeRO 3, accumulation, offload",
    "ZeRO 2, bfloat16",
    "ZeRO 3, bfloat16",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return said_by("tests.engines.deepspeeding", tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return said_by("tests.engines.killed", tmp_path_factory.mktemp("killed"), restarts=2)


def test_the_cases_are_these(said):
    assert list(said["cases"]) == CASES


def test_the_recipe_runs(said):
    assert said["steps of the page"] == 3


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_one_process(said, case):
    assert said["cases"][case]["off"] < (2e-2 if "bfloat16" in case else 1e-5)
    assert said["cases"][case]["without off"] > 2 * said["cases"][case]["off"]
    assert said["cases"][case]["epsilon"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("ZeRO 2", 1e-4),
        ("ZeRO 3", 1e-4),
        ("ZeRO 3, bfloat16", 0.03),
        ("ZeRO 3, a frozen layer", 1e-4),
        ("ZeRO 2, a kernel", 1e-4),
        ("ZeRO 3, a kernel", 1e-4),
        ("ZeRO 3, a kernel that stays", 1e-4),
    ],
)
def test_every_gradient_is_that_of_the_perturbed_weights(said, case, most):
    found = said["gradients"][case]
    assert found["off"] < most
    assert len(found["perturbed"]) == (1 if "frozen" in case else 4 if "kernel" in case else 3)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_resumes_to_the_bit(said, case):
    assert said["cases"][case]["resumed off"] == 0


@pytest.mark.parametrize("case", CASES)
def test_the_ascent_leaves_no_gradient_and_adds_two_sums(said, case):
    assert said["cases"][case]["faults"] == []


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_know_of_the_engine_is_refused(said, case):
    wrapped, inside = said["cases"][case]["refused"]
    assert wrapped.startswith("DeepSpeed steps inside its engine")
    assert "nusam.Perturbation(engine)" in wrapped
    assert inside.startswith("The model given as model= runs inside DeepSpeed's engine")


def test_steps_that_the_scaler_skips_do_not_count(said):
    scaled = said["scaled"]
    assert scaled["skipped"] > 3
    assert scaled["unperturbed"] == scaled["skipped"] + 3
    assert scaled["counted"]


def test_what_can_not_be_had_is_refused_in_a_sentence(said):
    refusals = dict(said["refusals"])
    assert refusals.pop("a fused head").startswith("head.weight is reached in pieces or by another way, where an ε in")
    inside = {case: refusals.pop(case) for case in list(refusals) if case.startswith("a step inside")}
    assert len(inside) == 12
    for refused in inside.values():
        assert refused.startswith("engine.step() was called inside the passes over a micro-batch")
    assert len(refusals) == 12
    for case, refused in refusals.items():
        steps = "DeepSpeed steps inside its engine"
        assert refused.startswith("A perturbation under DeepSpeed finds ε in layers" if "compiled" in case else steps)


@pytest.mark.parametrize(("case", "last"), [("ZeRO 2", 9), ("ZeRO 3", 6)])  # the last life finds the first at its end
def test_a_killed_process_changes_nothing_and_leaves_no_perturbed_weight_on_disk(killed, case, last):
    assert killed[case]["went on from"] == last
    assert killed[case]["off"] == 0
    assert killed[case]["checkpoints"] == 3
    assert killed[case]["alike on disk"]
