"""megatron-core's own GPTModel, saved by megatron from its ranks, then imported: the same logits, there and in transformers."""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint_files import find_damage, read_run_file
from megatron_ext.hf.export import export_checkpoint
from megatron_ext.hf.import_model import import_model
from megatron_ext.runtime import megatron_versions
from megatron_ext.runtime.launch import run_on_ranks
from megatron_ext.train.checkpoint_logits import checkpoint_logits
from tests.unit.test_hf_export import tokenizer_file  # noqa: F401

VOCAB_SIZE, PADDED = 1003, 1024
ROWS = torch.randint(5, VOCAB_SIZE, (2, 60), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass(frozen=True)
class Stock:
    """A model as Megatron-LM's command line would describe it, and its layout."""

    tensor: int = 1
    pipeline: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    """Of the sharded state: megatron's own choice is stacked layers."""
    family: str = "llama"

    def namespace(self) -> Namespace:
        """What Megatron-LM would store."""
        plain = {
            "num_layers": 4,
            "hidden_size": 96,
            "ffn_hidden_size": 80,
            "num_attention_heads": 6,
            "group_query_attention": True,
            "num_query_groups": 2,
            "kv_channels": 48,
            "normalization": "RMSNorm",
            "norm_epsilon": 1e-6,
            "swiglu": True,
            "position_embedding_type": "rope",
            "rotary_base": 50_000,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "use_rope_scaling": False,
            "rope_scaling_factor": 8.0,
            "rotary_seq_len_interpolation_factor": None,
            "untie_embeddings_and_output_weights": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "qk_layernorm": False,
            "max_position_embeddings": 512,
            "init_method_std": 0.015,
            "make_vocab_size_divisible_by": 128,
            "padded_vocab_size": PADDED,
            "num_experts": None,
            "window_size": None,
            "apply_layernorm_1p": False,
            "multi_latent_attention": False,
            "tensor_model_parallel_size": self.tensor,
            "data_path": ["a", "b"],
            "params_dtype": torch.float32,
            "iteration": 0,
        }
        return Namespace(**{**plain, **self.arguments})


MODELS = {
    "TP2": Stock(tensor=2),
    "PP2": Stock(pipeline=2),
    "TP2 tied, as many groups as heads": Stock(
        tensor=2, arguments={"untie_embeddings_and_output_weights": False, "group_query_attention": False, "kv_channels": None}
    ),
    "PP2 tied, biases": Stock(pipeline=2, arguments={"untie_embeddings_and_output_weights": False, "add_qkv_bias": True}),
    "TP2 norms": Stock(tensor=2, arguments={"qk_layernorm": True}, family="qwen3"),
    "PP2 stretched, layers apart": Stock(
        pipeline=2, arguments={"use_rope_scaling": True}, metadata={"non_homogeneous_layers": True}
    ),
}


def build_gpt(stock: Stock) -> Any:
    """megatron's GPTModel on this rank, every weight random."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(stock.tensor, stock.pipeline)
    model_parallel_cuda_manual_seed(1)
    arguments = stock.namespace()
    config = TransformerConfig(
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        ffn_hidden_size=arguments.ffn_hidden_size,
        num_attention_heads=arguments.num_attention_heads,
        num_query_groups=arguments.num_query_groups if arguments.group_query_attention else None,
        kv_channels=arguments.kv_channels,
        normalization=arguments.normalization,
        layernorm_epsilon=arguments.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arguments.add_qkv_bias,
        qk_layernorm=arguments.qk_layernorm,
        tensor_model_parallel_size=stock.tensor,
        pipeline_model_parallel_size=stock.pipeline,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arguments.qk_layernorm),
        PADDED,
        arguments.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=arguments.rotary_base,
        rope_scaling=arguments.use_rope_scaling,
    ).eval()
    disturb(model)
    return model


def disturb(model: torch.nn.Module) -> None:
    """Norms and biases are ones and zeros at first, which would hide what is mixed up. Replicas stay equal."""
    for name, parameter in model.named_parameters():
        shared = name.startswith("output_layer") or "embedding" in name  # on both stages where tied: by the shape alone
        replicated = not getattr(parameter, "tensor_model_parallel", False)
        seed = 7 if shared or replicated else 8 + torch.distributed.get_rank()
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data.add_(noise * 0.1)


def logits_of(model: Any) -> list[torch.Tensor] | None:
    """GPTModel's own logits [length, rows] of each row, through all stages; None where the last stage is not."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(batches: Any, model: Any) -> Any:
        (ids,) = torch.tensor(next(batches)).split(1)
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)  # True is hidden
        output = model(ids, torch.arange(ids.shape[1])[None], mask)
        return output, lambda logits, non_loss_data=False: logits

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([[row] for row in ROWS]),
            model=model,
            num_microbatches=len(ROWS),
            seq_length=len(ROWS[0]),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return [logits[0].clone() for logits in found] if parallel_state.is_pipeline_last_stage() else None


def save_stock(folder: Path) -> dict[str, list[torch.Tensor] | None]:
    """Build each model, run it, and save it as Megatron-LM does."""
    from megatron.core import dist_checkpointing

    found = {}
    for name, stock in MODELS.items():
        model = build_gpt(stock)
        found[name] = logits_of(model)
        target = folder / name / "iter_0001000"
        if torch.distributed.get_rank() == 0:
            target.mkdir(parents=True)
            (target.parent / "latest_checkpointed_iteration.txt").write_text("1000")
        torch.distributed.barrier()
        state = {
            "args": stock.namespace(),
            "checkpoint_version": 3.0,
            "iteration": 1000,
            "model": model.sharded_state_dict(metadata=stock.metadata),
            "opt_param_scheduler": {"max_lr": 1e-3},
        }
        dist_checkpointing.save(state, str(target))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[torch.Tensor]]]:
    """The folder of all checkpoints, and the logits of each model."""
    folder = tmp_path_factory.mktemp("stock")
    by_rank = run_on_ranks(save_stock, 2, folder)
    return folder, {name: by_rank[-1][name] for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_megatrons_model(
    name: str,
    saved: tuple[Path, dict[str, list[torch.Tensor]]],
    tokenizer_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder, logits = saved
    report = import_model(folder / name, tmp_path / "checkpoint", tokenizer=tokenizer_file, reference_logits=checkpoint_logits)
    assert report.vocab_size == VOCAB_SIZE and report.dtype == torch.float32
    assert report.verification.first_position_change == 0
    assert find_damage(tmp_path / "checkpoint") == {}
    imported = read_run_file(tmp_path / "checkpoint")["imported"]
    assert (imported["family"], imported["iteration"], imported["folder"]) == (MODELS[name].family, 1000, "iter_0001000")
    assert {".metadata", "__0_0.distcp"} <= imported["files"].keys()
    assert ("common.pt" in imported["files"]) == (megatron_versions.common_writer() is not None)
    for found, expected in zip(checkpoint_logits(tmp_path / "checkpoint", ROWS), logits[name], strict=True):
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(found, expected[:, :VOCAB_SIZE], rtol=0, atol=1e-5)
    exported = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model", reference_logits=checkpoint_logits)
    import transformers

    model = getattr(transformers, exported.architecture).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(ROWS)).logits
    for found, expected in zip(theirs, logits[name], strict=True):
        torch.testing.assert_close(found, expected[:, :VOCAB_SIZE], rtol=0, atol=1e-5)
