"""Retrieval: queries and documents as mean-pooled vectors, trained with InfoNCE against the other documents of the batch."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.evaluation.encoding import Feature, pad
from megatron_ext.evaluation.heads import mean_pool
from megatron_ext.evaluation.scores import Score, score_ranking
from megatron_ext.evaluation.sources import Examples, Row
from megatron_ext.evaluation.training import predict, train_loop

if TYPE_CHECKING:
    from megatron_ext.evaluation.finetune import FinetuneRun
    from megatron_ext.evaluation.tasks import Task

SCALE = 20.0
"""Of the cosines before the softmax: the inverse temperature."""


class Embedder(torch.nn.Module):
    """Mean-pooled hidden states; with queries, the loss of sentence-transformers (van den Oord et al., arXiv 1807.03748)."""

    def __init__(self, encoder: Any):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        super().__init__()
        self.encoder = encoder
        self._ranking_loss = [MultipleNegativesRankingLoss(None, scale=SCALE)]  # in a list: no part of this model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, query_ids: Tensor | None = None, query_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """[b, s] ids -> vectors [b, h]; with queries, short as they are and apart, also the loss: query n belongs to text n."""
        vectors = self._embed(input_ids, attention_mask)
        if query_ids is None:
            return {"logits": vectors}
        pairs = [self._embed(query_ids, query_mask).float(), vectors.float()]
        return {"logits": vectors, "loss": self._ranking_loss[0].compute_loss_from_embeddings(pairs, None)}

    def _embed(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return mean_pool(hidden, attention_mask)


def train_retriever(
    run: "FinetuneRun", task: "Task", examples: Examples, tokenizer: Any, backbone: Any, device: Any
) -> tuple[tuple[Score, Score], list[float]]:
    """Train on pairs, rank the documents of each split."""
    collate_one = partial(pad, pad_id=tokenizer.pad_token_id)

    def encode(texts: list[str]) -> list[Feature]:
        encoded = tokenizer(texts, truncation=True, max_length=task.max_length, return_token_type_ids=False)
        return [{name: encoded[name][n] for name in ("input_ids", "attention_mask")} for n in range(len(texts))]

    def embed(texts: list[str]) -> Tensor:
        return torch.from_numpy(np.stack(predict(model, encode(texts), run.settings, device, collate_one)))

    def collate(rows: list[Row]) -> dict[str, Any]:
        texts, queries = (collate_one(encode([row[name] for row in rows])) for name in ("positive", "query"))
        return {**texts, "query_ids": queries["input_ids"], "query_mask": queries["attention_mask"]}

    model = Embedder(backbone).to(device)
    rows = examples.train  # tokenized as they come: of a large set a run sees only some
    # Not by length: pairs of one text would meet in a batch, and each would be taught to be none of the other's.
    losses = train_loop(model, rows, [0] * len(rows), run.settings, run.learning_rate, run.seed, device, collate)
    validation, test = (_rank(embed, rows) for rows in (examples.validation, examples.test))
    return (validation, test), losses


def _rank(embed: Any, rows: list[Row]) -> Score:
    """Every query against the documents of its split, each of which is there once; rows of one query are its several answers."""
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    places = {text: place for place, text in enumerate(documents)}
    relevant: dict[str, list[int]] = {}
    for row in rows:
        relevant.setdefault(row["query"], []).append(places[row["positive"]])
    return score_ranking(embed(list(relevant)), embed(documents), list(relevant.values()))
