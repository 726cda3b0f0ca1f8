"""The models that can be named: small ones for a processor, those of the paper's Table 6, pretrained ones, encoders."""

from dataclasses import dataclass

from nusam.experiments.errors import Refused
from nusam.experiments.training.text import ENCODERS

__all__ = ["PRETRAINED", "SHAPES", "SMALL", "TITLES", "Shape", "require_fit"]


@dataclass(frozen=True)
class Shape:
    """Of a model: the image is cut into ``patches`` × ``patches``, or into patches of ``patch`` pixels.

    As in the paper (§5.1, "original configuration"), a Mixer embeds its patches by a matrix, which νSAM perturbs, and a
    ViT has a class token, which its head reads. ``otherwise``: timm's Mixer, whose stem is a convolution, and a ViT
    whose head reads the mean of its tokens.
    """

    title: str
    width: int
    depth: int
    heads: int = 0  # none is an MLP-Mixer
    patches: int = 0
    patch: int = 0
    otherwise: bool = False


SHAPES = {
    "mixer": Shape("Mixer", 64, 2, patches=4),
    "vit": Shape("ViT", 64, 2, heads=4, patches=4),
    "mixer-conv": Shape("Mixer (convolution as stem)", 64, 2, patches=4, otherwise=True),
    "vit-mean": Shape("ViT (no class token)", 64, 2, heads=4, patches=4, otherwise=True),
    "mixer-128": Shape("Mixer of width 128", 128, 4, patch=8),
    "vit-128": Shape("ViT of width 128", 128, 4, heads=4, patch=8),
    "vit-s/4": Shape("ViT-S/4", 384, 12, heads=6, patch=4),
    "vit-b/4": Shape("ViT-B/4", 768, 12, heads=12, patch=4),
    "mixer-s/4": Shape("Mixer-S/4", 512, 8, patch=4),
    "mixer-b/4": Shape("Mixer-B/4", 768, 12, patch=4),
}
PRETRAINED = {
    "vit-s/16": ("ViT-S/16", "vit_small_patch16_224"),
    "vit-b/16": ("ViT-B/16", "vit_base_patch16_224"),
    "mixer-b/16": ("Mixer-B/16", "mixer_b16_224"),
}
SMALL = ("mixer", "vit")  # those that two processor cores train in seconds
TITLES = {
    **{name: shape.title for name, shape in SHAPES.items()},
    **{name: title for name, (title, _) in PRETRAINED.items()},
    **{name: title for name, (title, *_) in ENCODERS.items()},
}


def require_fit(name: str, image_size: int, channels: int) -> None:
    """Refuse a model that is not for such data: square images, or sentences (0 channels)."""
    if (name in ENCODERS) != (channels == 0):
        kinds = ("sentences", "images") if name in ENCODERS else ("images", "sentences")
        raise Refused(f"{name} is a model for {kinds[0]}, and the data are {kinds[1]}; choose others.")
    if name not in SHAPES:
        return
    shape = SHAPES[name]
    cut = shape.patch or shape.patches
    if image_size < cut or image_size % cut:
        patches = f"patches of {cut} × {cut} pixels" if shape.patch else f"{cut} × {cut} patches"
        raise Refused(
            f"{name} cuts images into {patches}, and these have {image_size} × {image_size} pixels; scale them to a "
            f"multiple of {cut}, or choose another model."
        )
