"""Validation examples, carved from those for training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nusam.experiments.training.class_sizes import with_every_class
from nusam.experiments.training.data import Labels, Pixels, Source, Tokens, shuffled

__all__ = ["Dataset", "Images", "split"]


@dataclass(frozen=True)
class Images:
    """Images in −1..1, or the tokens of sentences, with their classes."""

    pixels: Tensor  # (N, C, S, S) float32, or (N, L) int64
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """What one run learns from, chooses ρ with, and is judged by."""

    train: Images
    validation: Images
    test: Images


def split(source: Source, seed: int, device: torch.device | str) -> Dataset:
    """Training and validation images are drawn from the pool by the seed; the test images are always the same.

    Every class is among those for training, if there are as many as classes.
    """
    drawn = shuffled(len(source.pool_labels), 0 if source.always_split else seed)
    order = with_every_class(drawn, source.pool_labels, source.train_size)

    def images(pixels: Pixels | Tokens, labels: Labels) -> Images:
        given = torch.from_numpy(pixels).to(device)
        scaled = given if source.channels == 0 else given.to(torch.float32).div_(127.5).sub_(1)
        return Images(scaled, torch.from_numpy(labels).to(device))

    train, validation = (
        images(source.pool[chosen], source.pool_labels[chosen])
        for chosen in (order[: source.train_size], order[source.train_size :])
    )
    return Dataset(train, validation, images(source.test, source.test_labels))
