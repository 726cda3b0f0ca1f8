"""Text encoders with a new head."""

from typing import Any

from torch import Tensor, nn

from nusam.experiments.training.text import END, needed, of_hub

__all__ = ["sentence_model"]


class SentenceClassifier(nn.Module):
    """Token ids (B, L), 0 where there is none, to logits (B, classes)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens != 0
        longest = int(there.sum(1).max())  # what all sentences of a batch lack is left out
        tokens, there = tokens[:, :longest], there[:, :longest]
        ends = tokens == END
        second = (ends.cumsum(1) > ends.long()).long()  # behind the first sentence's end
        logits: Tensor = self.encoder(tokens, attention_mask=there.long(), token_type_ids=second).logits
        return logits


def sentence_model(name: str, classes: int) -> nn.Module:
    """An encoder of :data:`nusam.experiments.training.text.ENCODERS` with a new head, pretrained but for the tiny one.

    Raises:
        Refused: if transformers or the weights are not at hand.
    """
    transformers: Any = needed("transformers")
    if name == "bert-tiny":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        encoder = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, num_labels=classes))
        return SentenceClassifier(encoder)
    return SentenceClassifier(of_hub(transformers.AutoModelForSequenceClassification, name, num_labels=classes))
