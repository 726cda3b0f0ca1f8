"""Builds the models of :mod:`nusam.experiments.training.models`."""

from collections.abc import Callable
from urllib.error import URLError

import timm
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate, unfold

from nusam.experiments.errors import Refused
from nusam.experiments.training.models import PRETRAINED, SHAPES, require_fit
from nusam.experiments.training.sentence_model import sentence_model
from nusam.experiments.training.text import ENCODERS

__all__ = ["build"]

_PRETRAINED_SIZE = 224  # pixels on a side, for which these models have positions and token mixers
_UNREACHABLE = (ConnectionError, TimeoutError, URLError, HfHubHTTPError, LocalEntryNotFoundError)


def build(name: str, image_size: int, channels: int, classes: int) -> nn.Module:
    """A freshly initialized model for square images, or for sentences (0 channels); a pretrained one with a new head.

    A pretrained model gets its images enlarged to the size that it was trained on.

    Raises:
        Refused: if the model is not for such data, or pretrained weights are not at hand and can't be downloaded.
    """
    require_fit(name, image_size, channels)
    if name in ENCODERS:
        return sentence_model(name, classes)
    if name in PRETRAINED:
        return _pretrained(PRETRAINED[name][1], channels, classes)
    shape = SHAPES[name]
    common: dict[str, int] = {
        "num_classes": classes,
        "img_size": image_size,
        "in_chans": channels,
        "patch_size": shape.patch or image_size // shape.patches,
        "embed_dim": shape.width,
    }
    if not shape.heads:
        mixer: Callable[..., nn.Module] = MlpMixer
        model = mixer(num_blocks=shape.depth, **common)
        if not shape.otherwise:
            stem = model.get_submodule("stem.proj")
            assert isinstance(stem, nn.Conv2d)
            model.stem = PatchEmbedding(stem)
        return model
    pool = {"class_token": False, "global_pool": "avg"} if shape.otherwise else {"global_pool": "token"}
    vit: Callable[..., nn.Module] = VisionTransformer
    return vit(depth=shape.depth, num_heads=shape.heads, **pool, **common)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel's size, as what it is: one matrix that all patches are multiplied with.

    Images of [batch, channels, height, width] become tokens of [batch, patches, width of the model].
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.size = convolution.kernel_size
        self.proj = nn.Linear(convolution.weight[0].numel(), convolution.out_channels)
        self.proj.load_state_dict({"weight": convolution.weight.flatten(1), "bias": convolution.bias})

    def forward(self, images: Tensor) -> Tensor:
        """The tokens, row by row."""
        projected: Tensor = self.proj(unfold(images, self.size, stride=self.size).mT)
        return projected


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
