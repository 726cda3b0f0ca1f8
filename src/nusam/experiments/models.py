"""Small timm models for a processor, those of the paper's Table 6, pretrained ones, and text encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from urllib.error import URLError

import timm
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nusam.experiments.errors import Refused
from nusam.experiments.text import ENCODERS, sentence_model

__all__ = ["SMALL", "TITLES", "build"]


@dataclass(frozen=True)
class Shape:
    """Of a model: the image is cut into ``patches`` × ``patches``, or into patches of ``patch`` pixels."""

    title: str
    width: int
    depth: int
    heads: int = 0  # none is an MLP-Mixer
    patches: int = 0
    patch: int = 0


_SHAPES = {
    "mixer": Shape("Mixer", 64, 2, patches=4),
    "vit": Shape("ViT", 64, 2, heads=4, patches=4),
    "vit-s/4": Shape("ViT-S/4", 384, 12, heads=6, patch=4),
    "vit-b/4": Shape("ViT-B/4", 768, 12, heads=12, patch=4),
    "mixer-s/4": Shape("Mixer-S/4", 512, 8, patch=4),
    "mixer-b/4": Shape("Mixer-B/4", 768, 12, patch=4),
}
_PRETRAINED = {
    "vit-s/16": ("ViT-S/16", "vit_small_patch16_224"),
    "vit-b/16": ("ViT-B/16", "vit_base_patch16_224"),
    "mixer-b/16": ("Mixer-B/16", "mixer_b16_224"),
}
_PRETRAINED_SIZE = 224  # pixels on a side, for which these models have positions and token mixers
_UNREACHABLE = (ConnectionError, TimeoutError, URLError, HfHubHTTPError, LocalEntryNotFoundError)
SMALL = ("mixer", "vit")  # those that two processor cores train in seconds
TITLES = {
    **{name: shape.title for name, shape in _SHAPES.items()},
    **{name: title for name, (title, _) in _PRETRAINED.items()},
    **{name: title for name, (title, *_) in ENCODERS.items()},
}


def build(name: str, image_size: int, channels: int, classes: int) -> nn.Module:
    """A freshly initialized model for square images, or for sentences (0 channels); a pretrained one with a new head.

    A pretrained model gets its images enlarged to the size that it was trained on.

    Raises:
        Refused: if the model is not for such data, or pretrained weights are not at hand and can't be downloaded.
    """
    if (name in ENCODERS) != (channels == 0):
        kinds = ("sentences", "images") if name in ENCODERS else ("images", "sentences")
        raise Refused(f"{name} is a model for {kinds[0]}, and the data are {kinds[1]}; choose others.")
    if name in ENCODERS:
        return sentence_model(name, classes)
    if name in _PRETRAINED:
        return _pretrained(_PRETRAINED[name][1], channels, classes)
    shape = _SHAPES[name]
    cut = shape.patch or shape.patches
    if image_size < cut or image_size % cut:
        patches = f"patches of {cut} × {cut} pixels" if shape.patch else f"{cut} × {cut} patches"
        raise Refused(
            f"{name} cuts images into {patches}, and these have {image_size} × {image_size} pixels; scale them to a "
            f"multiple of {cut}, or choose another model."
        )
    common: dict[str, int] = {
        "num_classes": classes,
        "img_size": image_size,
        "in_chans": channels,
        "patch_size": shape.patch or image_size // shape.patches,
        "embed_dim": shape.width,
    }
    if not shape.heads:
        mixer: Callable[..., nn.Module] = MlpMixer
        return mixer(num_blocks=shape.depth, **common)
    vit: Callable[..., nn.Module] = VisionTransformer
    return vit(depth=shape.depth, num_heads=shape.heads, class_token=False, global_pool="avg", **common)


def _pretrained(name: str, channels: int, classes: int) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, num_classes=classes, in_chans=channels)
    except _UNREACHABLE as error:
        raise Refused(
            f"The pretrained weights of {name} could not be loaded ({type(error).__name__}); connect to the network "
            "once, or choose a model that is trained from scratch."
        ) from error
    model.register_forward_pre_hook(_enlarged)
    return model


def _enlarged(model: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The images as the model's input, at the size of its pretraining."""
    return interpolate(inputs[0], size=_PRETRAINED_SIZE, mode="bilinear")
