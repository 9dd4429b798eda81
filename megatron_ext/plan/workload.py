"""What is trained: a model's shape and what its tokens attend to and predict; and its floating-point operations, counted once more
so that models of other projects (no gate, sliding windows) can be counted too. For our own models they equal `model.flops`."""

from dataclasses import dataclass

from megatron_ext.model.presets import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a transformer that decide its speed."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    gated: bool = True
    tied: bool = False
    rotary: bool = True
    local_layers: int = 0
    """Layers whose attention sees a sliding window only."""
    window: int = 0
    """Tokens in that window."""

    @classmethod
    def of(cls, encoder: EncoderConfig, vocab_size: int) -> "Shape":
        """The shape of one of our models."""
        return cls(
            layers=encoder.num_layers,
            hidden=encoder.hidden_size,
            ffn=encoder.ffn_hidden_size,
            heads=encoder.num_attention_heads,
            groups=encoder.num_query_groups,
            head_dim=encoder.head_dim,
            vocab=vocab_size,
            tied=encoder.tie_embeddings,
        )

    @property
    def query_width(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all keys of a token; values have as much."""
        return self.groups * self.head_dim

    @property
    def up_width(self) -> int:
        """Columns of the feed-forward block's first product: gate and up, or up alone."""
        return self.ffn * (2 if self.gated else 1)

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = self.hidden * (2 * self.query_width + 2 * self.key_width)
        return attention + self.hidden * (self.up_width + self.ffn)

    @property
    def parameters(self) -> int:
        """Numbers in all matrices."""
        return self.layers * self.layer_parameters + self.hidden * self.vocab * (1 if self.tied else 2)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A shape under one objective."""

    shape: Shape
    sequence: int
    """Tokens in a sample."""
    causal: bool = False
    predicted_share: float = 1.0
    """Share of the tokens with logits."""
    document: float | None = None
    """Mean over tokens of the length of the run of tokens they belong to, sum(l^2) / sum(l); None: the whole sample."""

    @property
    def run_length(self) -> float:
        """Length of the run of tokens that a token belongs to."""
        return float(self.sequence) if self.document is None else self.document

    @property
    def attended(self) -> float:
        """Tokens that a token sees in a layer without a window: half of the run if causal."""
        return self.run_length / 2 if self.causal else self.run_length

    @property
    def attended_in_window(self) -> float:
        """Tokens that a token sees in a layer with a window."""
        return min(float(self.shape.window), self.attended)

    def flops_per_token(self, *, attended: float | None = None) -> float:
        """Floating-point operations of forward and backward per token, without recomputation.

        Args:
            attended: another count of what the layers without a window attend to; published figures often count causal
                attention as full.
        """
        shape = self.shape
        everywhere = self.attended if attended is None else attended
        seen = (shape.layers - shape.local_layers) * everywhere + shape.local_layers * self.attended_in_window
        blocks = 6.0 * shape.layers * shape.layer_parameters
        return blocks + 12.0 * shape.query_width * seen + 6.0 * self.predicted_share * shape.hidden * shape.vocab
