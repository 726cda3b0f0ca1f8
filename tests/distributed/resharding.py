"""Five steps under FSDP2 from a checkpoint, or from the start: ``resharding.py FIRST_STEP OLD NEW``."""

import sys

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import nusam
from tests.distributed.engines import DEVICE, Net, base_optimizer, fsdp, train


def main() -> None:
    first, old, new = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    five_steps(first, old, new)
    dist.barrier()
    dist.destroy_process_group()


def five_steps(first: int, old: str, new: str) -> None:
    model = fsdp(Net(torch.float64))
    opt = nusam.NuSAM(base_optimizer("AdamW", model), 0.1, model=model, delay=2)
    if first:
        weights, state = get_state_dict(model, opt)
        dcp.load({"model": weights, "opt": state}, checkpoint_id=old)
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
    train(model, opt, torch.float64, False, dist.get_world_size(), dist.get_rank(), steps=5, first=first)
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=new)
