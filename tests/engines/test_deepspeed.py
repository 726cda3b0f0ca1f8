"""A perturbation under DeepSpeed in two processes equals νSAM in one, ends as it was resumed, and adds two sums."""

import importlib.util
import json
import os

import pytest

from tests.distributed.launching import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed; DS_BUILD_OPS=0 pip install 'nusam[deepspeed]'.",
    ),
]
CASES = [
    "ZeRO 0",
    "ZeRO 0, accumulation",
    "ZeRO 1, accumulation",
    "ZeRO 2",
    "ZeRO 2, accumulation, offload",
    "ZeRO 3",
    "ZeRO 3, accumulation, offload",
    "ZeRO 0, bfloat16",
    "ZeRO 2, bfloat16",
    "ZeRO 3, bfloat16",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed") / "said.json"
    environment = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, ["src", os.environ.get("PYTHONPATH", "")])))
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        python(*launcher, "--module", "tests.engines.deepspeeding", str(path))
    return json.loads(path.read_text())


def test_the_cases_are_these(said):
    assert list(said["cases"]) == CASES


def test_the_recipe_runs(said):
    assert said["steps of the page"] == 3


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_one_process(said, case):
    assert said["cases"][case]["off"] < (2e-2 if "bfloat16" in case else 1e-5)
    assert said["cases"][case]["without off"] > 2 * said["cases"][case]["off"]
    assert said["cases"][case]["epsilon"] == pytest.approx(0.1, rel=1e-3)


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
