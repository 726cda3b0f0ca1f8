"""Two processes equal one on the joint batch, through a checkpoint, with accumulation and clipping."""

from functools import cache
from itertools import product

import pytest
import torch

from tests.contract.plain_loop import PlainLoop
from tests.contract.processes import RUNS
from tests.distributed.launching import forked

ENGINES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder in which two processes that are started once for all runs of a framework have left their weights."""

    @cache
    def train(framework):
        folder = tmp_path_factory.mktemp(framework)
        runs = [(framework, engine, passes, str(folder / engine / passes)) for engine, passes in product(ENGINES, RUNS)]
        forked(2, "tests.contract.processes", *runs)
        return folder

    return train


@cache
def on_the_joint_batch(passes):
    return PlainLoop().train(RUNS[passes]).weights


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("framework", ["lightning", "transformers"])
@pytest.mark.parametrize("passes", RUNS)
def test_two_processes_equal_one_on_the_joint_batch(framework, engine, passes, trained):
    two = torch.load(trained(framework) / engine / passes / "weights.pt")
    for a, b in zip(on_the_joint_batch(passes), two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
