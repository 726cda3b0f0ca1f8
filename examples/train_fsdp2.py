"""A small MLP-Mixer on digits with νSAM under FSDP2 (fully_shard).

torchrun --nproc-per-node 2 --max-restarts 3 examples/train_fsdp2.py --resume
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from timm.models import MlpMixer
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nusam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2"), help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run(args, device)
    dist.destroy_process_group()


def run(args: argparse.Namespace, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)

    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)
    train, test = torch.utils.data.random_split(data, [1000, len(data) - 1000])
    sampler = DistributedSampler(train)  # every process sees a share of each batch
    loader = DataLoader(train, batch_size=64 // dist.get_world_size(), sampler=sampler, drop_last=True)

    model = MlpMixer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, num_blocks=2)
    for block in model.blocks:
        fully_shard(block.to(device), mesh=mesh)
    fully_shard(model.to(device), mesh=mesh)
    base = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    # matrix-free, a shared perturbation costs two small collectives and the ascent reduces no gradient
    opt = nusam.NuSAM(base, rho=0.02, model=model, ascent="matrix-free")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs)

    finished = sorted(args.folder.glob("epoch-????"))
    first = 0
    if args.resume and finished:
        weights, optimizer = get_state_dict(model, opt)
        saved = {"model": weights, "opt": optimizer, "schedule": schedule.state_dict()}
        dcp.load(saved, checkpoint_id=finished[-1])
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=optimizer)
        schedule.load_state_dict(saved["schedule"])
        first = int(finished[-1].name.removeprefix("epoch-")) + 1

    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        total = torch.zeros((), device=device)
        for x, y in loader:
            for name in opt.passes():
                loss = cross_entropy(model(x.to(device)), y.to(device))
                loss.backward()
                total += loss.detach() * (name == "descent")
            opt.step()
        schedule.step()

        model.eval()
        with torch.no_grad():
            x, y = (torch.stack(column).to(device) for column in zip(*test, strict=True))
            accuracy = (model(x).argmax(1) == y).float().mean()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            loss = total.item() / len(loader) / dist.get_world_size()
            print(f"epoch {epoch}: loss {loss:.6f}, test accuracy {accuracy:.1%}", flush=True)

        partial, whole = args.folder / "partial", args.folder / f"epoch-{epoch:04}"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            args.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        weights, optimizer = get_state_dict(model, opt)
        dcp.save({"model": weights, "opt": optimizer, "schedule": schedule.state_dict()}, checkpoint_id=partial)
        if dist.get_rank() == 0:
            partial.rename(whole)  # whole or not at all
        dist.barrier()


if __name__ == "__main__":
    main()
