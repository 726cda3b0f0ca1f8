"""A small MLP-Mixer on digits with νSAM in Lightning's Fabric, a loop of one's own.

python examples/train_fabric.py --precision bf16-mixed
torchrun --nproc-per-node 2 examples/train_fabric.py --devices 2
"""

import argparse
from pathlib import Path

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from timm.models import MlpMixer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import nusam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/fabric"), help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="32-true", help="or bf16-mixed, 16-mixed (on a GPU)")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    args = parser.parse_args()

    fabric = Fabric(devices=args.devices, precision=args.precision)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)
    train, test = random_split(data, [1000, len(data) - 1000])
    loader = fabric.setup_dataloaders(DataLoader(train, batch_size=50, shuffle=True, drop_last=True))

    mixer = MlpMixer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, num_blocks=2)
    model = fabric.setup_module(mixer)  # first: the optimizer must know by what it is wrapped
    base = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = args.epochs * len(loader) // args.accumulate
    opt = fabric.setup_optimizers(nusam.NuSAM(base, rho=0.02, delay=int(0.1 * steps), model=model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt.optimizer, args.epochs)

    checkpoint = args.folder / "last.ckpt"
    state = {"model": model, "opt": opt, "schedule": schedule, "epoch": 0}
    if args.resume and checkpoint.exists():
        fabric.load(checkpoint, state)

    for epoch in range(state["epoch"], args.epochs):
        model.train()
        total = torch.zeros((), device=fabric.device)
        for index, (x, y) in enumerate(loader, start=1):
            for name in opt.passes(accumulate=True):
                loss = cross_entropy(model(x), y) / args.accumulate
                fabric.backward(loss)
                total += loss.detach() * (name == "descent")
            if index % args.accumulate == 0:
                fabric.clip_gradients(model, opt, max_norm=1.0, error_if_nonfinite=False)  # a scaler skips those
                opt.step()
                opt.zero_grad()
        schedule.step()
        fabric.log_dict(opt.metrics(), step=epoch)  # to the loggers that Fabric was given

        model.eval()
        with torch.no_grad():
            x, y = (torch.stack(column).to(fabric.device) for column in zip(*test, strict=True))
            accuracy = (model(x).argmax(1) == y).float().mean()
        loss = fabric.all_reduce(total) * args.accumulate / len(loader)
        fabric.print(f"epoch {epoch}: loss {loss:.6f}, test accuracy {accuracy:.1%}")
        fabric.save(checkpoint, {**state, "epoch": epoch + 1})


if __name__ == "__main__":
    main()
