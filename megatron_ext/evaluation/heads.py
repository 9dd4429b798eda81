"""Heads on an encoder. All weights are trained; a head's own are drawn as the encoder's were."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

INIT_STD = 0.02


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """[b, s, h], [b, s] -> [b, h]: the mean over the tokens that are there; zero where there are none."""
    kept = attention_mask[..., None].to(hidden.dtype)
    return (hidden * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


class _Headed(torch.nn.Module):
    def __init__(self, encoder: Any, outputs: int):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, outputs)
        torch.nn.init.normal_(self.head.weight, std=INIT_STD)
        torch.nn.init.zeros_(self.head.bias)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class SequenceClassifier(_Headed):
    """Mean-pooled hidden states, one linear layer, cross-entropy."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """[b, s] ids -> logits [b, labels]."""
        logits = self.head(mean_pool(self._hidden(input_ids, attention_mask), attention_mask))
        return _with_loss(logits, labels)


class TokenClassifier(_Headed):
    """One linear layer on every token, cross-entropy on those with a label (not -100)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """[b, s] ids -> logits [b, s, labels]."""
        return _with_loss(self.head(self._hidden(input_ids, attention_mask)), labels)


class SpanFinder(_Headed):
    """Start and end of an answer: two numbers for every token, each a softmax over the row; no answer is the first token."""

    def __init__(self, encoder: Any):
        super().__init__(encoder, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """[b, s] ids -> logits [b, s, 2]; padding is -inf."""
        logits = self.head(self._hidden(input_ids, attention_mask))
        logits = logits.masked_fill(attention_mask[..., None] == 0, torch.finfo(logits.dtype).min)
        if start_positions is None or end_positions is None:
            return {"logits": logits}
        loss = (cross_entropy(logits[..., 0], start_positions) + cross_entropy(logits[..., 1], end_positions)) / 2
        return {"loss": loss, "logits": logits}


def _with_loss(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    if labels is None:
        return {"logits": logits}
    return {"loss": cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}
