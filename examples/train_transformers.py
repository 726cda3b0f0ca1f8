"""A small ViT on digits with νSAM in Hugging Face's Trainer.

python examples/train_transformers.py --bf16 --accumulate 2
torchrun --nproc-per-node 2 examples/train_transformers.py
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import nusam
from nusam.integrations.transformers import NuSAMTrainerMixin


class MyTrainer(NuSAMTrainerMixin, Trainer):
    pass


class PrintEpoch(TrainerCallback):
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            gap = logs.get("sharpness_gap", 0.0)
            print(f"epoch {round(logs['epoch']) - 1}: loss {logs['loss']:.6f}, gap {gap:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/transformers"), help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fp16", action="store_true", help="on a GPU")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    args = parser.parse_args()

    set_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    train, test = data[:1000], data[1000:]

    shape = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        id2label={digit: str(digit) for digit in range(10)},
    )
    model = ViTForImageClassification(shape)
    trainer = MyTrainer(
        model,
        TrainingArguments(
            output_dir=str(args.folder),
            use_cpu=not torch.cuda.is_available(),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=50,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=2e-3,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            bf16=args.bf16,
            fp16=args.fp16,
            logging_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
        callbacks=[PrintEpoch()],
        sharpness_aware=partial(nusam.NuSAM, rho=0.01),
        delay_ratio=0.1,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    accuracy = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
