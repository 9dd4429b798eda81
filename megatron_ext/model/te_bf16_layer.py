"""A bfloat16 layer among FP8 ones under Transformer Engine's delayed scaling."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from transformer_engine.pytorch import fp8_autocast, fp8_model_init


class BFloat16Layer(TransformerLayer):
    """A layer that stays in bfloat16 inside a block that runs in FP8 with delayed scaling.

    megatron enters Transformer Engine's FP8 context once for the whole block then, and refuses exceptions. A disabled context
    inside it is one: it ends no forward pass, so the scales of the other layers are not touched.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Args as of `TransformerLayer`."""
        with fp8_model_init(enabled=False):
            super().__init__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Args and returns as of `TransformerLayer`."""
        with fp8_autocast(enabled=False):
            return super().forward(*args, **kwargs)
