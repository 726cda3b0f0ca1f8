"""What a run can be computed on, by name. Only a name that needs looking up waits for torch."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from nusam.experiments.errors import Refused

if TYPE_CHECKING:
    import torch

__all__ = ["PARALLEL", "PRECISIONS", "device_name", "jobs_on", "require_device"]

PRECISIONS = ("fp32", "bf16", "fp16")
PARALLEL = ("ddp", "fsdp2")


def require_device(name: str) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        Refused: if it has none of that name.
    """
    if name == "cpu":  # which every machine has
        return
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    allowed = ["cpu"]
    if accelerator is not None:
        indices = range(torch.accelerator.device_count())
        allowed += [accelerator.type, *(f"{accelerator.type}:{index}" for index in indices)]
    if name not in allowed:
        raise Refused(f"--device must be {' or '.join(allowed)} on this machine, got {name}.")


def device_name(device: "torch.device | str") -> str:
    """The device and, where that is known, its model, on which the last digits of a run depend."""
    name = str(device)
    if name == "cpu":
        model = _processor()
        return f"{name} ({model})" if model else name
    if not name.startswith("cuda"):
        return name
    import torch

    return f"{name} ({torch.cuda.get_device_name(name)})"


def _processor() -> str:
    """Its model as the system has it; Linux tells more than Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def jobs_on(name: str) -> int:
    """How many runs go side by side: one for each core of a processor, one at a time elsewhere."""
    if name != "cpu":
        return 1
    import torch

    return torch.get_num_threads()
