"""What a run is computed on: device, precision, compilation, and the processes that share it."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Machine", "launched", "one_thread"]

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Machine:
    """The same run anywhere.

    Args:
        device: of this process.
        precision: fp32, or bf16 or fp16 for autocast (fp16 with a GradScaler).
        compiled: whether the model is compiled.
        parallel: ddp or fsdp2, if several processes share the run.
    """

    def __init__(
        self, device: torch.device, precision: str = "fp32", compiled: bool = False, parallel: str = "ddp"
    ) -> None:
        self.device, self.compiled, self.parallel = device, compiled, parallel
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self._low = _AUTOCAST[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model as the processes share it."""
        if self.processes > 1 and self.parallel == "fsdp2":
            mesh = init_device_mesh(self.device.type, (self.processes,))
            for block in getattr(model, "blocks", []):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif self.processes > 1:
            model = DistributedDataParallel(model)
        return torch.compile(model) if self.compiled else model  # type: ignore[return-value]

    def share(self, batch: Tensor) -> Tensor:
        """Of the joint batch, the part of this process."""
        return batch[dist.get_rank() :: self.processes] if self.processes > 1 else batch

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward."""
        return torch.autocast(self.device.type, self._low, enabled=self._low is not None)


@contextmanager
def launched(device: str) -> Iterator[torch.device]:
    """Take part in what torchrun or accelerate launched, if it did; the device of this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield torch.device(device)
        return
    mine = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    try:
        yield mine
        dist.barrier()  # a process that leaves early takes what the others still wait for
    finally:
        dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a worker, however many a machine has: sums in another order are other weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
