"""Training in two processes, by :mod:`tests.distributed.launching`; its arguments are FRAMEWORK ENGINE PASSES FOLDER.

FRAMEWORK is ``lightning`` or ``transformers``, ENGINE ``ddp`` or ``fsdp2``, PASSES ``two`` or ``one``. The processes
share batches of 32, and rank 0 saves the weights.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.contract.problem import Net, Run, Trained, data

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}, "accelerator_config": {"use_configured_state": True}}
JOINT = Run(steps=10, micro_batches=2, batch=32, clip=0.1)
RUNS = {"two": JOINT, "one": replace(JOINT, share=1 / 4, one_pass=True)}


def lightning(engine: str, joint: Run, folder: Path) -> nn.Module:
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    from tests.contract.lightning_loop import Module, trainer_on_cpu

    class Sharded(Module):
        def configure_model(self):
            shard(self.net, self.device_mesh["data_parallel"])

    def fit(epochs: int, checkpoint: Path | None = None) -> pl.Trainer:
        strategy = (
            DDPStrategy(process_group_backend="gloo")
            if engine == "ddp"
            else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        )
        trainer = trainer_on_cpu(
            joint.one_pass,
            devices=2,
            strategy=strategy,
            max_epochs=epochs,
            accumulate_grad_batches=joint.micro_batches,
            gradient_clip_val=joint.clip,
        )
        module = (Module if engine == "ddp" else Sharded)(Trained.start(joint))
        images = data(joint)
        sampler = DistributedSampler(images, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
        batches = DataLoader(images, batch_size=joint.batch // 2, sampler=sampler)  # Lightning's own would shuffle
        trainer.fit(module, batches, ckpt_path=checkpoint)
        return trainer

    fit(1).save_checkpoint(folder / "half.ckpt")
    return fit(2, folder / "half.ckpt").lightning_module.net


def transformers(engine: str, joint: Run, folder: Path) -> nn.Module:
    from tests.contract.transformers_loop import NetWithLoss, digits_trainer

    if engine == "fsdp2":
        fsdp2_on_cpu()

    def train(**options) -> nn.Module:
        share = replace(joint, batch=joint.batch // 2, folder=folder, **options)
        trained = Trained.start(share, NetWithLoss)
        images = in_halves(data(joint), joint.batch) if joint.one_pass else data(joint)
        trainer = digits_trainer(trained, images, ddp_backend="gloo", **FSDP2 if engine == "fsdp2" else {})
        trainer.train(resume_from_checkpoint=share.resume)
        assert trained.opt._ascent.states.keys() <= set(trained.opt._parameters())  # whole matrices are not kept alive
        return trainer.model

    train(steps=5)
    return train(resume=True)


def in_halves(images: TensorDataset, batch: int) -> TensorDataset:
    """So that the first samples of both processes, which get half a batch each, are the first of a joint batch."""
    order = torch.arange(len(images)).view(-1, batch // 2, 2).mT.reshape(-1)
    return TensorDataset(*(tensor[order] for tensor in images.tensors))


def shard(net: Net, mesh: dist.DeviceMesh | None = None) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.layers[0], mesh=mesh)
    fully_shard(net, mesh=mesh)


def fsdp2_on_cpu() -> None:
    """accelerate offers FSDP where it finds accelerators only; these processes pose as such until it has asked."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=True, backend="gloo")
    state.distributed_type = DistributedType.MULTI_XPU


def main() -> None:
    framework, engine, passes, folder = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    model = globals()[framework](engine, RUNS[passes], Path(folder))
    assert (engine == "fsdp2") == all(hasattr(p, "full_tensor") for p in model.parameters())
    weights = [getattr(p.detach(), "full_tensor", p.detach)() for p in model.parameters()]
    if int(os.environ["RANK"]) == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    if dist.is_initialized():
        dist.barrier()  # a process that leaves early takes what the others still wait for
        dist.destroy_process_group()
    os._exit(0)  # under FSDP2 on gloo the interpreter's own end aborts now and then, without nusam too
