"""Small configurations of timm's architectures."""

from collections.abc import Callable

from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

__all__ = ["TITLES", "build"]

TITLES = {"mixer": "Mixer", "vit": "ViT"}

PATCHES_PER_SIDE = 4
WIDTH = 64
DEPTH = 2


def _mixer(image_size: int, channels: int, classes: int) -> nn.Module:
    model: nn.Module = MlpMixer(
        num_classes=classes,
        img_size=image_size,
        in_chans=channels,
        patch_size=image_size // PATCHES_PER_SIDE,
        num_blocks=DEPTH,
        embed_dim=WIDTH,
    )
    return model


def _vit(image_size: int, channels: int, classes: int) -> nn.Module:
    model: nn.Module = VisionTransformer(
        num_classes=classes,
        img_size=image_size,
        in_chans=channels,
        patch_size=image_size // PATCHES_PER_SIDE,
        depth=DEPTH,
        embed_dim=WIDTH,
        num_heads=4,
        class_token=False,
        global_pool="avg",
    )
    return model


def build(name: str, image_size: int, channels: int, classes: int) -> nn.Module:
    """A freshly initialized model for square images."""
    return _BUILDERS[name](image_size, channels, classes)


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {"mixer": _mixer, "vit": _vit}
