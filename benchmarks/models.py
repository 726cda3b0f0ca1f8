"""The models that the benchmarks time and weigh, each with a loss of one batch."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Problem:
    """A model, and the loss of one batch of it."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    rows: int  # tokens that a batch sends through each layer, about


def _images(model: nn.Module, batch: int, size: int, tokens: int, device: str) -> Problem:
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.randint(0, 10, (batch,), device=device)
    return Problem(model.to(device), lambda m: F.cross_entropy(m(x), y), batch * tokens)


def _vit(width: int, depth: int, heads: int, patch: int, size: int) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=10
    )


def _tokens(model: nn.Module, batch: int, length: int, vocabulary: int, device: str) -> Problem:
    x = torch.randint(0, vocabulary, (batch, length), device=device)

    def loss(m: nn.Module) -> Tensor:
        out = m(input_ids=x)
        if hasattr(out, "logits"):
            return F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())
        return out.last_hidden_state.float().square().mean()

    return Problem(model.to(device), loss, batch * length)


def _decoder(width: int, depth: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
    )
    return transformers.LlamaForCausalLM(config)


CPU: dict[str, Callable[[str], Problem]] = {
    "ViT-S/4": lambda d: _images(_vit(384, 12, 6, 4, 32), 32, 32, 65, d),
    "Mixer-S/4": lambda d: _images(
        timm.models.MlpMixer(num_classes=10, img_size=32, patch_size=4, num_blocks=8, embed_dim=512), 32, 32, 64, d
    ),
    "ViT-B/16": lambda d: _images(_vit(768, 12, 12, 16, 224), 2, 224, 197, d),
    "BERT-base": lambda d: _tokens(
        transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False), 4, 128, 30522, d
    ),
    "GPT-2": lambda d: _tokens(transformers.GPT2LMHeadModel(transformers.GPT2Config()), 2, 128, 50257, d),
}
CUDA: dict[str, Callable[[str], Problem]] = {
    **CPU,
    "ViT-L/16": lambda d: _images(_vit(1024, 24, 16, 16, 224), 32, 224, 197, d),
    "decoder 1.3B": lambda d: _tokens(_decoder(2048, 24), 2, 1024, 32000, d),
}
