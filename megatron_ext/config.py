"""The run's configuration: one tree of dataclasses. `config_reading.py` reads it from YAML and the command line.

Each class checks its own fields in `__post_init__`; `RunConfig` checks the combinations that need nothing but the
configuration. What needs a tokenizer, a data set or the number of ranks is checked in `megatron_ext.train.preflight`, still
before any process group exists. This module imports neither torch nor megatron.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ext.errors import UserError
from megatron_ext.secrets import redact

OBJECTIVE_NAMES = ("clm", "mlm", "mntp")


def require(condition: bool, message: str) -> None:
    """Refuse a configuration with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _require_positive(where: str, **values: float | None) -> None:
    for name, value in values.items():
        require(value is None or 0 < value < math.inf, f"{where}.{name} is {value}: it must be greater than 0")


def _require_share(where: str, **values: float | None) -> None:
    for name, value in values.items():
        require(value is None or 0.0 <= value <= 1.0, f"{where}.{name} is {value}: it must lie between 0 and 1")


RotaryScaling = Literal["none", "linear", "llama3"]


@dataclass(kw_only=True)
class ModelConfig:
    """The encoder's shape: a preset's or a checkpoint's, and any field of it set otherwise (null: as that says)."""

    checkpoint: str | None = None
    """Begin with the shape and the weights of this checkpoint, imported from Hugging Face or trained; null draws new weights."""
    preset: str | None = None
    """Name of a preset in megatron_ext/model/presets.py: nano, tiny, 210m, 610m, 1b or 2b (default: tiny)."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the hidden states."""
    ffn_hidden_size: int | None = None
    """Inner width of the gated (SwiGLU) feed-forward block."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); must divide the query heads."""
    head_dim: int | None = None
    """Width of one head; need not equal hidden_size / num_attention_heads."""
    rotary_base: float | None = None
    """RoPE theta."""
    norm_epsilon: float | None = None
    """Epsilon of the RMS norms."""
    init_std: float | None = None
    """Standard deviation of the initial weights; the projections back into the residual get it / sqrt(2 layers)."""
    tie_embeddings: bool | None = None
    """Share the embedding with the language-model head."""
    max_position_embeddings: int | None = None
    """Longest sequence that the exported model announces."""
    qkv_bias: bool | None = None
    """Biases on the projections to queries, keys and values, as in Qwen2."""
    qk_norm: bool | None = None
    """Norm queries and keys per head, as in Qwen3."""
    rotary_scaling: RotaryScaling | None = None
    """Stretch RoPE to longer texts: `linear` divides all angles by rotary_factor, `llama3` only the slow ones."""
    rotary_factor: float | None = None
    """How far RoPE is stretched."""
    rotary_low_frequency_factor: float | None = None
    """`llama3`: angles that turn less often than this in rotary_original_length are divided by the whole factor."""
    rotary_high_frequency_factor: float | None = None
    """`llama3`: angles that turn more often than this are left as they are."""
    rotary_original_length: int | None = None
    """`llama3`: length that the model was trained with before it was stretched."""

    def __post_init__(self) -> None:
        require(
            self.checkpoint is None or self.preset is None,
            f"model.preset is {self.preset} with model.checkpoint {self.checkpoint}, which has a shape already: give one of them",
        )
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        _require_positive("model", **{name: value for name, value in numbers.items() if not isinstance(value, str | bool)})


@dataclass(kw_only=True)
class DataSource:
    """One tokenized data set of a blend."""

    prefix: str
    """Path of a Megatron data set without its .bin/.idx ending."""
    weight: float = 1.0
    """Share of the samples drawn from this set, relative to the other weights."""

    def __post_init__(self) -> None:
        _require_positive(f"data source {self.prefix}", weight=self.weight)


@dataclass(kw_only=True)
class DataConfig:
    """What is read, and how it is cut into samples."""

    tokenizer: str
    """SentencePiece .model file, or a folder with a Hugging Face tokenizer."""
    train: list[DataSource]
    """The training blend."""
    validation: list[DataSource] = field(default_factory=list)
    """The validation blend; when empty, the validation share of `split` of the training sets."""
    split: list[float] = field(default_factory=lambda: [0.98, 0.01, 0.01])
    """Shares of each training set's documents for training, validation and test, in document order."""
    sequence_length: int = 2048
    """Tokens in a sample."""
    documents_attend_across: bool = False
    """Let the documents packed in one sample see each other."""
    restart_positions: bool = True
    """Count the position ids of each packed document from 0."""

    def __post_init__(self) -> None:
        _require_positive("data", sequence_length=self.sequence_length)
        require(bool(self.train), "data.train is empty: name at least one data set prefix")
        require(
            len(self.split) == 3 and all(share >= 0 for share in self.split) and abs(sum(self.split) - 1) < 1e-6,
            f"data.split is {self.split}: it must hold three shares (train, validation, test) that sum to 1",
        )
        require(self.split[0] > 0, f"data.split is {self.split}: the training share must be greater than 0")


@dataclass(kw_only=True)
class MaskingConfig:
    """Which tokens the masked objectives hide, and what stands in their place."""

    ratio: float = 0.4
    """Share of the maskable tokens that is selected for prediction (at the phase's first step)."""
    final_ratio: float | None = None
    """Ratio at the phase's last step, reached linearly; null keeps `ratio` constant."""
    mask_share: float = 1.0
    """Share of the selected tokens replaced by the mask token."""
    random_share: float = 0.0
    """Share of the selected tokens replaced by a random ordinary token."""
    keep_share: float = 0.0
    """Share of the selected tokens left as they are (and still predicted)."""
    count: Literal["bernoulli", "exact"] = "bernoulli"
    """`bernoulli` selects each unit independently; `exact` selects round(ratio x maskable tokens) tokens of a sample."""
    unit: Literal["token", "word", "span"] = "token"
    """What is selected as a whole: single tokens, whole words, or spans of random length."""
    mean_span_length: float = 3.0
    """Mean of the geometric span lengths (in tokens, at most 10) when unit is `span`."""

    def __post_init__(self) -> None:
        for name, value in (("ratio", self.ratio), ("final_ratio", self.final_ratio)):
            require(value is None or 0.0 < value < 1.0, f"masking.{name} is {value}: it must lie between 0 and 1, both excluded")
        _require_share("masking", mask_share=self.mask_share, random_share=self.random_share, keep_share=self.keep_share)
        shares = self.mask_share + self.random_share + self.keep_share
        require(abs(shares - 1) < 1e-6, f"masking.mask_share + random_share + keep_share is {shares:g}: it must be 1")
        _require_positive("masking", mean_span_length=self.mean_span_length)
        require(self.mean_span_length >= 1, f"masking.mean_span_length is {self.mean_span_length}: it must be at least 1")


@dataclass(kw_only=True)
class PhaseConfig:
    """One stretch of the run under one objective, or one mixture of objectives."""

    objective: str | dict[str, float]
    """clm, mlm or mntp; or a mixture such as {clm: 0.25, mlm: 0.75}, drawn per global micro-batch."""
    steps: int | None = None
    """Length in optimizer steps."""
    tokens: int | None = None
    """Length in tokens, rounded up to whole steps. Give either `steps` or `tokens`."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    """Masking of mlm and mntp."""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """What happens to the optimizer's moments when the phase starts."""
    learning_rate: Literal["continue", "rewarm"] = "continue"
    """`rewarm` starts the learning-rate schedule anew with this phase; the schedule spans the phases up to the next `rewarm`."""

    def __post_init__(self) -> None:
        names = self.objective if isinstance(self.objective, dict) else {self.objective: 1.0}
        for name, weight in names.items():
            require(name in OBJECTIVE_NAMES, f"phase objective is '{name}': allowed are {', '.join(OBJECTIVE_NAMES)}")
            require(0 < weight < math.inf, f"phase objective {name} has the weight {weight}: it must be greater than 0")
        require(bool(names), "phase objective is an empty mixture: name at least one objective")
        require(sum(names.values()) < math.inf, "phase objective has weights that sum to infinity: give smaller ones")
        require(
            (self.steps is None) != (self.tokens is None),
            f"phase '{'+'.join(names)}' has steps={self.steps} and tokens={self.tokens}: give exactly one of them",
        )
        _require_positive(f"phase '{'+'.join(names)}'", steps=self.steps, tokens=self.tokens)


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over the ranks; the data-parallel size follows from the number of ranks."""

    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks on each pipeline rank (interleaved schedule when greater than 1)."""
    sequence: bool = True
    """Sequence parallelism in the tensor-parallel regions (only matters when tensor > 1)."""
    context: int = 1
    """Context-parallel size: splits the tokens of a micro-batch over ranks, attention included."""
    distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_gradient_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass goes on (GPU only)."""
    overlap_parameter_gather: bool = False
    """Gather updated weights while the next forward pass goes on (GPU only; needs both overlap_gradient_reduce and
    distributed_optimizer)."""
    overlap_tensor_communication: bool = False
    """Overlap tensor-parallel communication with the products around it (Transformer Engine only; needs sequence)."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("tensor", "pipeline", "virtual_pipeline", "context")}
        _require_positive("parallel", **sizes)
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline is {self.virtual_pipeline} with parallel.pipeline 1: interleaving needs pipeline > 1",
        )
        require(
            not self.overlap_parameter_gather or (self.overlap_gradient_reduce and self.distributed_optimizer),
            "parallel.overlap_parameter_gather is true: it needs parallel.distributed_optimizer and "
            "parallel.overlap_gradient_reduce to be true as well",
        )
        require(
            not self.overlap_tensor_communication or (self.sequence and self.tensor > 1),
            "parallel.overlap_tensor_communication is true: it needs parallel.tensor > 1 and parallel.sequence true",
        )


Recipe = Literal["fp32", "bf16", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8"]


@dataclass(kw_only=True)
class PrecisionConfig:
    """Numbers of the weights, activations and products; the optimizer's master weights are always float32."""

    recipe: Recipe = "fp32"
    """float32, bfloat16, or bfloat16 with the layers' matrix products in FP8: one scale a tensor, from past or present values
    (fp8-delayed, fp8-tensorwise), one a block of 128 (fp8-blockwise), or one a block of 32 (mxfp8, Blackwell)."""
    emulation: bool = False
    """Round the operands of an FP8 recipe in torch instead of running FP8 kernels: its numbers without its speed, on any device."""
    fp8_parameters: bool = False
    """Keep the weights of FP8 layers in FP8 and gather them so between data-parallel ranks (needs distributed_optimizer)."""
    bf16_first_layers: int = 1
    """Layers at the start that stay in bfloat16 under an FP8 recipe."""
    bf16_last_layers: int = 1
    """Layers at the end that stay in bfloat16 under an FP8 recipe. The embedding and the head always do."""
    amax_history_length: int = 1024
    """fp8-delayed: steps whose largest values decide the scale."""

    def __post_init__(self) -> None:
        _require_positive("precision", amax_history_length=self.amax_history_length)
        for name in ("bf16_first_layers", "bf16_last_layers"):
            require(getattr(self, name) >= 0, f"precision.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("emulation", "fp8_parameters"):
            require(
                self.is_fp8 or not getattr(self, name),
                f"precision.{name} is true with precision.recipe {self.recipe}: only FP8 recipes have it",
            )
        require(
            not (self.emulation and self.fp8_parameters),
            "precision.fp8_parameters is true with precision.emulation: the emulation keeps weights in bfloat16",
        )

    @property
    def is_fp8(self) -> bool:
        """The layers' products are in FP8, by kernels or emulated."""
        return self.recipe not in ("fp32", "bf16")

    @property
    def label(self) -> str:
        """For people: an emulated recipe is never called by the name of the kernels alone."""
        return f"{self.recipe} (emulation)" if self.emulation else self.recipe


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Warmup-stable-decay (linear decay), warmup and cosine, or warmup and constant."""
    warmup_steps: int = 0
    """Steps of linear warmup at the start of each schedule segment."""
    decay_steps: int = 0
    """Steps of linear decay at the end of each schedule segment (wsd only)."""
    beta1: float = 0.9
    """AdamW beta 1."""
    beta2: float = 0.95
    """AdamW beta 2."""
    epsilon: float = 1e-5
    """AdamW epsilon."""
    weight_decay: float = 0.1
    """Weight decay; norms and biases have none."""
    clip_grad_norm: float = 1.0
    """Limit of the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _require_positive("optimizer", learning_rate=self.learning_rate, epsilon=self.epsilon)
        for name in ("min_learning_rate", "warmup_steps", "decay_steps", "weight_decay", "clip_grad_norm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizer.{name} is {value}: it must be finite and not negative")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= beta < 1, f"optimizer.{name} is {beta}: it must be at least 0 and below 1")
        require(math.isfinite(self.learning_rate), f"optimizer.learning_rate is {self.learning_rate}: it must be finite")
        require(
            self.schedule == "wsd" or self.decay_steps == 0,
            f"optimizer.decay_steps is {self.decay_steps} with schedule {self.schedule}: only wsd has a decay length",
        )
        require(
            self.min_learning_rate <= self.learning_rate,
            f"optimizer.min_learning_rate {self.min_learning_rate} is above optimizer.learning_rate {self.learning_rate}",
        )


Recompute = Literal["none", "attention", "full"]


@dataclass(kw_only=True)
class TrainingConfig:
    """Batch sizes, numbers and what ends the run."""

    seed: int = 0
    """Seed of the weights, the data order and the masks."""
    micro_batch_size: int = 1
    """Samples in one forward pass of one data-parallel rank."""
    global_batch_size: int = 8
    """Samples in one optimizer step."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it: nothing, the core attention, or whole layers."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers: torch modules, Transformer Engine modules, or what this machine has."""
    stop_at_step: int | None = None
    """Save and stop after this step, to be continued later; null runs the whole plan."""
    log_interval: int = 10
    """Steps between two lines of metrics."""
    log_batches: bool = False
    """Write the index of every sample and sums of its tokens and masks to `<output_dir>/batches/`, to prove what was seen."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped because their loss or gradients are not finite, before the run stops."""
    timeout_minutes: float = 10.0
    """How long one micro-batch, save or load may take before the run counts as hanging and ends, naming the rank."""

    def __post_init__(self) -> None:
        sizes = ("micro_batch_size", "global_batch_size", "stop_at_step", "log_interval")
        _require_positive("training", **{name: getattr(self, name) for name in sizes}, timeout_minutes=self.timeout_minutes)
        require(self.max_skipped_steps >= 0, f"training.max_skipped_steps is {self.max_skipped_steps}: it must not be negative")
        require(0 <= self.seed < 2**63, f"training.seed is {self.seed}: it must lie between 0 and 2^63 - 1")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"training.global_batch_size {self.global_batch_size} is not a multiple of "
            f"training.micro_batch_size {self.micro_batch_size}",
        )


@dataclass(kw_only=True)
class ValidationConfig:
    """Validation on a fixed set: under the phase's own objective, and always under MLM so that phases can be compared."""

    interval: int = 100
    """Steps between two validations (one more at each phase edge and at the end); 0 switches validation off."""
    samples: int = 64
    """Samples in the fixed validation set."""
    mask_ratio: float | None = None
    """Ratio of the comparison MLM; null takes the ratio at the end of the plan's last masked phase (0.4 if there is none)."""

    def __post_init__(self) -> None:
        require(self.interval >= 0, f"validation.interval is {self.interval}: it must not be negative")
        _require_positive("validation", samples=self.samples)
        require(
            self.mask_ratio is None or 0 < self.mask_ratio < 1,
            f"validation.mask_ratio is {self.mask_ratio}: it must lie between 0 and 1, both excluded",
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved; the folder is `<output_dir>/checkpoints`."""

    interval: int = 1000
    """Steps between two checkpoints (one more at each phase edge and at the end); 0 saves only at the end."""
    asynchronous: bool = True
    """Write in the background while training goes on; needs room for a second copy of weights and moments in host memory."""
    keep_last: int = 0
    """Newest checkpoints to keep besides those that are kept for ever; 0 keeps all."""
    keep_every: int = 0
    """Steps between two checkpoints that are kept for ever, as those at phase edges are; 0 for none."""
    branch_points: list[int] = field(default_factory=list)
    """Steps after which the run is saved for ever, to branch from them. A checkpoint that a run has branched from is kept, too."""
    max_failures: int = 3
    """Saves in a row that may fail, for instance on a full disk, before the run stops; the last one of a run must not fail."""

    def __post_init__(self) -> None:
        require(self.interval >= 0, f"checkpoint.interval is {self.interval}: it must not be negative")
        for name in ("keep_last", "keep_every", "max_failures"):
            require(getattr(self, name) >= 0, f"checkpoint.{name} is {getattr(self, name)}: it must not be negative")
        for step in self.branch_points:
            _require_positive("checkpoint", branch_points=step)


@dataclass(kw_only=True)
class TrackingConfig:
    """MLflow; metrics also always go to `<output_dir>/metrics.jsonl`."""

    mlflow: bool = True
    """Track the run in MLflow."""
    uri: str | None = None
    """Tracking server; null is an embedded SQLite file in output_dir. Its credentials belong in the environment variables
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""
    experiment: str = "megatron_ext"
    """MLflow experiment."""
    run_name: str | None = None
    """MLflow run name; null is the name of output_dir."""


@dataclass(kw_only=True)
class RunConfig:
    """One training run: what `pretrain_encoder.py` reads and every checkpoint stores."""

    output_dir: str
    """Folder for checkpoints, metrics and the embedded MLflow file."""
    data: DataConfig
    """Data and tokenizer."""
    phases: list[PhaseConfig]
    """The phase plan, in order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model shape."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallel layout."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Numbers of weights, activations and products."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning-rate schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Batches, numbers, logging."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Experiment tracking."""
    resume: str = "never"
    """`never` starts anew, `auto` continues from the newest sound checkpoint in output_dir if there is one, a path loads it."""
    resume_changes: list[str] = field(default_factory=list)
    """Fields that may differ from the checkpoint's although they change the data, the masks, the model or the schedule."""

    def __post_init__(self) -> None:
        require(bool(self.phases), "phases is empty: the plan needs at least one phase")
        require(
            not self.precision.fp8_parameters or self.parallel.distributed_optimizer,
            "precision.fp8_parameters is true: it needs parallel.distributed_optimizer to be true as well",
        )
        self._check_backend()

    def _check_backend(self) -> None:
        """FP8 kernels are Transformer Engine's, and emulation replaces the torch layers' products."""
        precision, backend = self.precision, self.training.backend
        require(
            not precision.emulation or backend != "transformer_engine",
            "precision.emulation is true with training.backend transformer_engine: it replaces the torch layers; use auto or local",
        )
        require(
            not precision.is_fp8 or precision.emulation or backend != "local",
            f"precision.recipe is {precision.recipe} with training.backend local: FP8 kernels are Transformer Engine's; use auto, "
            "or set precision.emulation to true",
        )

    def as_dict(self) -> dict[str, Any]:
        """The whole tree as plain dictionaries, lists and numbers (what the checkpoint stores)."""
        return dataclasses.asdict(self)

    def public_dict(self) -> dict[str, Any]:
        """The same without secrets: what is shown, and what is stored for others to read."""
        return redact(self.as_dict())
