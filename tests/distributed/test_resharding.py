"""A checkpoint of two processes is taken up by four, and theirs by one."""

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import nusam
from tests.distributed.engines import Net, base_optimizer, train
from tests.distributed.launching import forked


@pytest.mark.slow
def test_two_processes_then_four_then_one(tmp_path):
    for processes, first in ((2, 0), (4, 5), (1, 10)):
        old, new = tmp_path / f"step-{first}", tmp_path / f"step-{first + 5}"
        forked(processes, "tests.distributed.resharding", (str(first), str(old), str(new)))
    dcp_to_torch_save(tmp_path / "step-15", tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt")
    alone = Net(torch.float64)
    opt = nusam.NuSAM(base_optimizer("AdamW", alone), 0.1, delay=2)
    train(alone, opt, torch.float64, steps=15)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(saved["model"][name], value, rtol=0, atol=1e-10)
    for (name, parameter), state in zip(alone.named_parameters(), opt.state_dict()["state"].values(), strict=True):
        if parameter.ndim == 2:
            torch.testing.assert_close(saved["opt"]["state"][name]["nusam_u"], state["nusam_u"], rtol=0, atol=1e-9)
