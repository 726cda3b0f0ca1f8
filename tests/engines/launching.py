"""Starts two processes under DeepSpeed, on CPUs."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import python

NEEDS_DEEPSPEED = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed; DS_BUILD_OPS=0 pip install 'nusam[deepspeed]'.",
    ),
]


def said_by(module: str, folder: Path, restarts: int = 0) -> Any:
    """What the first of two processes wrote down that ran the module's script."""
    said = folder / "said.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("DS_BUILD_OPS", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, ["src", os.environ.get("PYTHONPATH", "")])))
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts))
        python(*launcher, "--module", module, str(said))
    return json.loads(said.read_text("utf-8"))
