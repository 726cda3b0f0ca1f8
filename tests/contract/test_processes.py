"""Two processes equal one on the joint batch, through a checkpoint, with accumulation and clipping."""

import pytest
import torch

from tests.contract.plain_loop import PlainLoop
from tests.contract.processes import RUNS
from tests.distributed.launching import torchrun


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("framework", ["lightning", "transformers"])
@pytest.mark.parametrize("passes", ["two", "one"])
def test_two_processes_equal_one_on_the_joint_batch(framework, engine, passes, tmp_path):
    torchrun(2, "tests.contract.processes", framework, engine, passes, str(tmp_path), module=True)
    one, two = PlainLoop().train(RUNS[passes]), torch.load(tmp_path / "weights.pt")
    for a, b in zip(one.weights, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
