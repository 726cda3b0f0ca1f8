"""A run under DeepSpeed that loses a process in each pass once; ``python -m tests.engines.killed said.json``."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch.nn import functional as F

import nusam
from tests.engines.deepspeeding import RHO, distance, engine_of, in_processes, part, weights

STEPS, BETWEEN, FATAL = 9, 3, 7  # FATAL is behind a checkpoint, and before the next
CASES = {"ZeRO 2": (2, 1, "float32", False), "ZeRO 3": (3, 1, "float32", False)}
DIES_IN = {"ZeRO 2": 0, "ZeRO 3": 1}  # ascent, descent


def train(case, folder, dies_in=None, life=0):
    """The weights after all steps, of which those before the last checkpoint are not taken again."""
    engine = engine_of(case)
    perturbation = nusam.Perturbation(engine, RHO)
    first = 0
    if (folder / "latest").exists():
        _, client_state = engine.load_checkpoint(folder)
        perturbation.load_state_dict(client_state["nusam"])
        first = client_state["step"]
    for step in range(first, STEPS):
        for number, (xs, ys) in enumerate(perturbation.passes(*part(step))):
            loss = F.cross_entropy(engine(xs), ys)
            if step == FATAL and number == dies_in and life == int(os.environ["TORCHELASTIC_RESTART_COUNT"]):
                os.kill(os.getpid(), signal.SIGKILL) if dist.get_rank() == 1 else dist.barrier()
            engine.backward(loss)
        engine.step()
        if (step + 1) % BETWEEN == 0:
            state = {"nusam": perturbation.state_dict(), "step": step + 1}
            engine.save_checkpoint(folder, tag=f"step-{step + 1}", client_state=state)
    return weights(engine), first


def saved(folder):
    """The weights of every checkpoint, as DeepSpeed reads them for use elsewhere."""
    return {
        tag.name: get_fp32_state_dict_from_zero_checkpoint(folder, tag.name) for tag in sorted(folder.glob("step-*"))
    }


def said(_):
    root = Path(sys.argv[1]).parent  # the same in every life
    found = {}
    for life, (case_name, case) in enumerate(CASES.items()):
        survived, first = train(case, root / f"killed-{life}", DIES_IN[case_name], life)
        undisturbed, _ = train(case, root / f"undisturbed-{life}")
        dist.barrier()
        one, other = saved(root / f"killed-{life}"), saved(root / f"undisturbed-{life}")
        found[case_name] = {
            "went on from": first,
            "off": distance(survived, undisturbed),
            "checkpoints": len(one),
            "alike on disk": one.keys() == other.keys()
            and all(torch.equal(w, other[tag][name]) for tag, state in one.items() for name, w in state.items()),
        }
    return found


if __name__ == "__main__":
    in_processes(said, sys.argv[1])
