"""accelerate and Trainer on DeepSpeed in two processes equal νSAM in one, and end as they were resumed."""

import pytest

from tests.engines.launching import NEEDS_DEEPSPEED, said_by

pytestmark = NEEDS_DEEPSPEED
CASES = ["ZeRO 2, accumulation", "ZeRO 3"]
each = pytest.mark.parametrize("case", CASES)
through = pytest.mark.parametrize("framework", ["accelerate", "trainer"])


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return said_by("tests.engines.frameworks", tmp_path_factory.mktemp("frameworks"))


@through
@each
def test_twenty_steps_equal_one_process(said, framework, case):
    assert list(said[framework]) == CASES
    assert said[framework][case]["steps"] == 20
    assert said[framework][case]["off"] < 1e-5
    assert said[framework][case]["without off"] > 0.01


@through
@each
def test_a_checkpoint_resumes_to_the_bit(said, framework, case):
    assert said[framework][case]["resumed off"] == 0


def test_the_recipes_run(said):
    assert said["steps of the page"] == {"accelerate": 2, "Trainer": 3}


@each
def test_what_trainer_logs(said, case):
    assert said["trainer"][case]["logged"] == [1.0] * 4


@each
def test_an_optimizer_is_refused(said, case):
    assert "hand passes() a nusam.Perturbation(model)" in said["accelerate"][case]["refused"]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("another method", "NotImplementedError: Under DeepSpeed νSAM alone can be had, got SAM; hand over"),
        ("another argument", "NotImplementedError: Under DeepSpeed νSAM has no ascent="),
        ("one pass", "NotImplementedError: one_pass=True can't be had under DeepSpeed"),
        ("another training_step", "RuntimeError: ElsewhereTrained.training_step reaches neither"),
    ],
)
def test_what_can_not_be_had_is_refused(said, what, sentence):
    assert said["refusals"][what].startswith(sentence)
