"""A small ViT on digits with νSAM, by timm's own model, task, optimizer, schedule and loss scaler.

python examples/train_timm.py --opt nusam-adamw --opt-kwargs rho=0.01 delay=40
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import NativeScaler, ParseKwargs
from torch.utils.data import DataLoader, TensorDataset

from nusam.integrations.timm import update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--opt", default="nusam-adamw")
    parser.add_argument("--opt-kwargs", nargs="*", default={"rho": 0.01, "delay": 40}, action=ParseKwargs)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--layer-decay", type=float, default=0.9)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--warmup-epochs", type=int, default=1)
    parser.add_argument("--clip-grad", type=float)
    parser.add_argument("--clip-mode", default="norm", choices=["norm", "value", "agc"])
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--amp", action="store_true", help="float16 with a loss scaler")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)
    train, test = torch.utils.data.random_split(data, [1000, len(data) - 1000])
    loader = DataLoader(train, batch_size=50 // args.grad_accum_steps, shuffle=True)

    shape = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 64,
        "num_heads": 4,
        "depth": 3,
        "global_pool": "avg",
    }
    model = timm.create_model("vit_tiny_patch16_224", **shape, num_classes=10, drop_path_rate=0.1).to(device)
    task = ClassificationTask(model, criterion_kwargs={"smoothing": 0.1}, device=device)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs, model=model)
    updates = len(loader) // args.grad_accum_steps
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    scaler = NativeScaler(device.type) if args.amp else None

    for epoch in range(epochs):
        model.train()
        total = torch.zeros((), device=device)
        for batch, (x, y) in enumerate(loader, 1):
            x, y = x.to(device), y.to(device)
            for name in optimizer.passes(accumulate=args.grad_accum_steps > 1):
                with torch.autocast(device.type, torch.float16, enabled=args.amp):
                    loss = task(x, y)["loss"] / args.grad_accum_steps
                if scaler is None:
                    loss.backward()
                else:
                    scaler(loss, optimizer, need_update=False)
                total += loss.detach() * (name == "descent")
            if batch % args.grad_accum_steps == 0:
                update(optimizer, scaler, args.clip_grad, args.clip_mode)
                optimizer.zero_grad()
        schedule.step(epoch + 1)

        model.eval()
        with torch.no_grad():
            x, y = (torch.stack(column).to(device) for column in zip(*test, strict=True))
            accuracy = (model(x).argmax(1) == y).float().mean()
        print(f"epoch {epoch}: loss {total.item() / updates:.4f}, test accuracy {accuracy:.1%}", flush=True)


if __name__ == "__main__":
    main()
