"""A small MLP-Mixer on digits with νSAM on Hugging Face's accelerate, a loop of one's own.

python examples/train_accelerate.py --precision bf16 --accumulate 2
torchrun --nproc-per-node 2 examples/train_accelerate.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from timm.models import MlpMixer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import nusam
from nusam.integrations.accelerate import passes, sharpness_aware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"), help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"], help="fp16 on a GPU")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    args = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without a GPU, torchrun's processes are found only if told
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
    )
    set_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    data = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)
    train, test = random_split(data, [1000, len(data) - 1000])
    loader = DataLoader(train, batch_size=50, shuffle=True, drop_last=True)

    mixer = MlpMixer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, num_blocks=2)
    base = torch.optim.AdamW(mixer.parameters(), lr=2e-3, weight_decay=0.05)
    steps = args.epochs * len(loader) // args.accumulate
    opt = nusam.NuSAM(base, rho=0.02, delay=int(0.1 * steps), model=mixer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    model, opt, loader, schedule = accelerator.prepare(mixer, opt, loader, schedule)

    first = 0
    saved = args.folder / "last"
    if args.resume and saved.exists():
        accelerator.load_state(saved)
        first = schedule.scheduler.last_epoch * args.accumulate // len(loader) // accelerator.num_processes

    for epoch in range(first, args.epochs):
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for x, y in loader:
            with accelerator.accumulate(model):
                for name in passes(opt, model):
                    loss = cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    total += loss.detach() * (name == "descent")
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
        accelerator.log(sharpness_aware(opt).metrics(), step=epoch)  # to the trackers that accelerate was given

        model.eval()
        with torch.no_grad():
            x, y = (torch.stack(column).to(accelerator.device) for column in zip(*test, strict=True))
            accuracy = (model(x).argmax(1) == y).float().mean()
        loss = accelerator.reduce(total, "mean") / len(loader)
        accelerator.print(f"epoch {epoch}: loss {loss:.6f}, test accuracy {accuracy:.1%}", flush=True)
        accelerator.save_state(saved)
    accelerator.end_training()


if __name__ == "__main__":
    main()
