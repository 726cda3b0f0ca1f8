"""Random crops, flips and AutoAugment, each image by itself."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nusam.experiments.errors import Refused

if TYPE_CHECKING:
    import torch

__all__ = ["AUGMENTATIONS", "augmented", "require_images"]

# Crops are padded by an eighth of the image: 4 pixels of CIFAR's 32, 1 of the digits' 8. Digits are not flipped.
AUGMENTATIONS = {
    "none": "no augmentation",
    "crop": "random crops",
    "crop-flip": "random crops and flips",
    "crop-flip-autoaugment": "random crops, flips and AutoAugment",
}


def require_images(name: str, data: str, channels: int) -> None:
    """Refuse to augment what has no channels."""
    if channels == 0 and name != "none":
        raise Refused(f"--augment {name} is for images, and {data} are sentences; leave it out.")


def augmented(pixels: "torch.Tensor", name: str, noise: "torch.Generator") -> "torch.Tensor":
    """A batch (B, C, S, S) of images in −1..1, each changed at random; drawn from ``noise`` alone."""
    if name == "none":
        return pixels
    import torch

    change = _pipeline(name, pixels.shape[-1])
    state = torch.get_rng_state()
    try:
        torch.manual_seed(int(torch.randint(2**62, (), generator=noise)))
        return torch.stack([change(image) for image in pixels])
    finally:
        torch.set_rng_state(state)


def _pipeline(name: str, size: int) -> "Callable[[torch.Tensor], torch.Tensor]":
    from torchvision.transforms import v2

    steps: list[Callable[..., Any]] = [v2.RandomCrop(size, padding=max(1, size // 8), fill=-1)]
    if "flip" in name:
        steps.append(v2.RandomHorizontalFlip())
    if "autoaugment" in name:
        steps += [_bytes, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), _floats]
    change: Callable[[torch.Tensor], torch.Tensor] = v2.Compose(steps)
    return change


def _bytes(image: "torch.Tensor") -> "torch.Tensor":
    """From −1..1 to the bytes that AutoAugment takes."""
    return image.add(1).mul(127.5).round().byte()


def _floats(image: "torch.Tensor") -> "torch.Tensor":
    """And back."""
    return image.float().div(127.5).sub(1)
