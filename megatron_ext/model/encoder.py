"""EncoderModel: embedding, megatron's TransformerBlock, and the sparse head; or the part of them a pipeline stage holds."""

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.data.batch import MicroBatch
from megatron_ext.model.attention import AttentionLayout
from megatron_ext.model.head import LanguageModelHead
from megatron_ext.model.layers import LayerKind, block_spec
from megatron_ext.model.presets import EncoderConfig
from megatron_ext.model.rotary import rotary_frequencies


class EncoderModel(LanguageModule):
    """A Llama-shaped transformer whose attention is causal or bidirectional as each batch says.

    Parameter names are those of megatron's GPTModel, so its checkpoints can be read.
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoder: EncoderConfig,
        layers: LayerKind,
        vocab_size: int,
        padded_vocab_size: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ):
        """Build this stage.

        Args:
            config: megatron's configuration (see `layers.transformer_config`).
            encoder: the model's shape.
            layers: torch or Transformer Engine modules.
            vocab_size: ids that belong to tokens.
            padded_vocab_size: rows of the embedding, a multiple of the tensor-parallel size.
            pre_process: this stage holds the embedding.
            post_process: this stage holds the head.
            vp_stage: which chunk of this rank it is, when interleaved.
        """
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = encoder.tie_embeddings
        tp_group = self.pg_collection.tp
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab_size,
                max_sequence_length=encoder.max_position_embeddings,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=True,
                tp_group=tp_group,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=encoder.head_dim,
            rotary_percent=1.0,
            rotary_base=encoder.rotary_base,
            cp_group=self.pg_collection.cp,
        )
        self.rotary_pos_emb.inv_freq = rotary_frequencies(encoder).to(self.rotary_pos_emb.inv_freq.device)
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(config, layers, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = LanguageModelHead(
                encoder.hidden_size,
                padded_vocab_size,
                vocab_size=vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and encoder.tie_embeddings,
                tp_group=tp_group,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by megatron's schedules with what the stage before sent."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: MicroBatch, return_logits: bool = False) -> Tensor:
        """Run this stage.

        Args:
            batch: the micro-batch; every stage gets the same one.
            return_logits: give the logits at all positions instead of the loss (last stage).

        Returns:
            The sum of the losses (scalar, float32) on the last stage, hidden states [t, 1, h] on the others.
        """
        hidden = self.decoder(
            hidden_states=self._embed(batch) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=self._rotary(batch),
            packed_seq_params=AttentionLayout.of(batch),
        )
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if return_logits:
            return self.output_layer.logits(hidden, weight)
        return self.output_layer(hidden, batch.target_positions, batch.target_ids, weight)

    def _embed(self, batch: MicroBatch) -> Tensor:
        """[t] ids -> [t, 1, h], or this rank's part of it under sequence parallelism."""
        return self.embedding(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])

    def _rotary(self, batch: MicroBatch) -> Tensor:
        """[t, 1, 1, d] angles, looked up by position."""
        # `packed_seq`: megatron must not cut the table for context parallelism; the positions are those of this part already.
        return self.rotary_pos_emb(batch.max_position, packed_seq=True).to(batch.position_ids.device)[batch.position_ids]
