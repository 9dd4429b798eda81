"""Published training speeds on GPUs, as data: what the speed model is calibrated on and held against.

Which rows calibrate follows from a rule, not from how well they fit: every other row, in the order in which they stand here, of
those in BF16 or FP8 on H100s whose conditions are published. The others are held out. No constant belongs to a single row.
"""

from megatron_ext.plan.anchor import Anchor
from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import Gpu
from megatron_ext.plan.workload import Shape, Workload

MI250X_DIE = Gpu("mi250x", None, 191.5e12, 0, 64e9, 1.6e12, 200e9, network=12.5e9, processors=110)
"""One of the two dies that count as devices (AMD's data sheet, halved); no efficiency of it is known here."""

MEGATRON = "Megatron-LM README (2024)"
FOUNDRY = "llm-foundry, scripts/train/benchmarking"
BRIDGE = "Megatron Bridge performance summary"


def _megatron(
    name: str, heads: int, hidden: int, layers: int, teraflops: float, *, calibrates: bool = False, assumed: str, **run: int
) -> Anchor:
    """All at data-parallel size 48 (6,144 GPUs at TP8 PP16), s 4096; attention is counted in full, whatever the mask skips.

    The global batch is known for the smallest (192) and for the 175B of the same page (1,152); between them it is interpolated in
    the logarithm of the size, to multiples of 48.
    """
    shape = Shape(
        layers=layers,
        hidden=hidden,
        ffn=4 * hidden,
        heads=heads,
        groups=heads,
        head_dim=hidden // heads,
        vocab=131072,
        gated=False,
        rotary=False,
    )
    work = Workload(shape=shape, sequence=4096, causal=True)
    overlap = {"overlap_tensor": True, "overlap_reduce": True, "overlap_gather": True}
    return Anchor(
        name=f"Megatron {name}",
        source=MEGATRON,
        work=work,
        run=Execution(data=48, **overlap, **run),
        tokens_per_second=teraflops * 1e12 / work.flops_per_token(attended=4096),
        published=f"{teraflops} TFLOP/s, full attention counted",
        assumed=assumed,
        calibrates=calibrates,
    )


MPT = {
    size: Shape(
        layers=24,
        hidden=hidden,
        ffn=4 * hidden,
        heads=hidden // 128,
        groups=hidden // 128,
        head_dim=128,
        vocab=50368,
        gated=False,
        tied=True,
        rotary=False,
    )
    for size, hidden in (("760m", 1536), ("1b", 2048))
}


def _foundry(
    size: str,
    sequence: int,
    gpus: int,
    micro: int,
    steps: int,
    speed: int,
    mfu: float,
    recipe: str = "bf16",
    calibrates: bool = False,
) -> Anchor:
    """FSDP; the table's own columns. Their MFU counts every parameter, embedding included, and full attention."""
    run = Execution(
        data=gpus,
        micro_batch=micro,
        global_batch=gpus * micro * steps,
        recipe=recipe,
        stack="autocast",
        attention="triton",
        fused_loss=True,
        sharded_weights=True,
        gathered_bytes=4,
    )
    return Anchor(
        name=f"MPT-{size} s{sequence} {gpus} GPUs{' FP8' if run.is_fp8 else ''}",
        source=FOUNDRY,
        work=Workload(shape=MPT[size], sequence=sequence, causal=True),
        run=run,
        tokens_per_second=speed,
        published=f"{speed:,} tokens/s, MFU {mfu} %, all parameters and full attention counted",
        assumed="Triton attention of 2023 (the yamls say so); weights gathered in float32",
        calibrates=calibrates,
    )


def _bridge(
    name: str, shape: Shape, sequence: int, speed: int, teraflops: float, calibrates: bool = False, **run: object
) -> Anchor:
    overlap = {"overlap_tensor": True, "overlap_reduce": True, "overlap_gather": True}
    return Anchor(
        name=name,
        source=BRIDGE,
        work=Workload(shape=shape, sequence=sequence, causal=True),
        run=Execution(fused_loss=True, **overlap, **run),
        tokens_per_second=speed,
        published=f"{speed:,} tokens/s, {teraflops} TFLOP/s, causal attention counted",
        calibrates=calibrates,
    )


def _llama(layers: int, hidden: int, ffn: int, heads: int, groups: int = 8, vocab: int = 128256) -> Shape:
    return Shape(layers=layers, hidden=hidden, ffn=ffn, heads=heads, groups=groups, head_dim=128, vocab=vocab)


MODERNBERT = {
    size: Shape(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=hidden // 64,
        groups=hidden // 64,
        head_dim=64,
        vocab=50368,
        tied=True,
        local_layers=local,
        window=128,
    )
    for size, layers, hidden, ffn, local in (("base", 22, 768, 1152, 14), ("large", 28, 1024, 2624, 18))
}


def _modernbert(size: str, sequence: int, micro: int, steps: int, thousands: int, calibrates: bool = False) -> Anchor:
    run = Execution(
        data=8,
        micro_batch=micro,
        global_batch=8 * micro * steps,
        stack="compiled",
        attention="flash3",
        fused_loss=True,
        distributed_optimizer=False,
        overlap_reduce=True,
    )
    return Anchor(
        name=f"ModernBERT-{size} s{sequence}",
        source="arXiv 2412.13663 and its yamls",
        work=Workload(shape=MODERNBERT[size], sequence=sequence, predicted_share=0.3),
        run=run,
        tokens_per_second=thousands * 1e3,
        published=f"about {thousands}K tokens/s over the whole run",
        assumed="documents as long as the sample (the lengths in the packed samples are not published)",
        calibrates=calibrates,
    )


NEOBERT = Anchor(
    name="NeoBERT 250M s1024",
    source="arXiv 2502.19587",
    work=Workload(shape=Shape(layers=28, hidden=768, ffn=2048, heads=12, groups=12, head_dim=64, vocab=30522), sequence=1024),
    run=Execution(
        data=8,
        micro_batch=32,
        global_batch=2048,
        stack="autocast",
        attention="flash2",
        distributed_optimizer=True,
        overlap_reduce=True,
    ),
    tokens_per_second=2.1e12 / (6000 * 3600),
    published="2.1T tokens in 6,000 GPU-hours",
    assumed="all: the hours are a round figure of the whole run; recomputation, data loading and stops are not published",
    known=False,
)
STUDY = Anchor(
    name="610M on MI250X",
    source="arXiv 2507.00994, from its GPU-hours",
    work=Workload(
        shape=Shape(layers=26, hidden=1152, ffn=4096, heads=18, groups=6, head_dim=64, vocab=128256),
        sequence=2048,
        predicted_share=1.0,
    ),
    run=Execution(
        data=192,
        micro_batch=12,
        global_batch=2304,
        stack="autocast",
        attention="flash2",
        overlap_reduce=True,
        distributed_optimizer=False,
    ),
    tokens_per_second=4900,
    published="about 4.9K tokens/s per device",
    assumed="all; another vendor, whose products and attention reach other shares of the peak",
    gpu=MI250X_DIE,
    known=False,
)

ANCHORS: tuple[Anchor, ...] = (
    _megatron("1.7B", 16, 2048, 24, 408.8, micro_batch=2, global_batch=192, calibrates=True, assumed="micro-batch 2"),
    _megatron("7.1B", 32, 4096, 30, 465.9, tensor=2, global_batch=480, assumed="micro-batch 1, global batch"),
    _megatron("16B", 48, 6144, 32, 489.1, tensor=4, global_batch=672, calibrates=True, assumed="micro-batch 1, global batch"),
    _megatron("32B", 56, 7168, 48, 459.6, tensor=8, global_batch=816, assumed="micro-batch 1, global batch"),
    _megatron(
        "70B",
        64,
        8192,
        84,
        419.7,
        tensor=8,
        pipeline=2,
        virtual=6,
        global_batch=960,
        calibrates=True,
        assumed="micro-batch 1, global batch, 6 chunks a stage",
    ),
    _megatron(
        "119B",
        80,
        10240,
        92,
        420.5,
        tensor=8,
        pipeline=4,
        virtual=23,
        global_batch=1056,
        assumed="micro-batch 1, global batch, 23 chunks a stage (92 / 4 has no other divisor)",
    ),
    _foundry("760m", 2048, 8, 24, 2, 63147, 34.9, calibrates=True),
    _foundry("760m", 2048, 16, 24, 1, 68551, 37.89),
    _foundry("1b", 2048, 8, 14, 1, 45455, 41.82, calibrates=True),
    _foundry("1b", 2048, 16, 20, 1, 46037, 42.36),
    _foundry("1b", 512, 8, 56, 4, 52275, 43.21, calibrates=True),
    _foundry("1b", 512, 8, 56, 4, 70315, 29.06, recipe="fp8-delayed"),
    _foundry("1b", 8192, 8, 3, 4, 29157, 37.73, calibrates=True),
    _foundry("1b", 8192, 8, 2, 4, 32010, 20.71, recipe="fp8-delayed"),
    _bridge("Qwen3-8B", _llama(36, 4096, 12288, 32, vocab=151936), 4096, 10456, 512.7, data=16, global_batch=1024, calibrates=True),
    _bridge(
        "Llama3-8B FP8",
        _llama(32, 4096, 14336, 32),
        8192,
        14451,
        744,
        data=8,
        global_batch=128,
        recipe="fp8-tensorwise",
        sharded_weights=True,
    ),
    _modernbert("base", 1024, 96, 6, 312, calibrates=True),
    _modernbert("base", 8192, 12, 6, 239),
    _modernbert("large", 1024, 56, 11, 142, calibrates=True),
    _modernbert("large", 8192, 7, 11, 116),
    _bridge(
        "Llama3-70B FP8 (TP4 PP8)",
        _llama(80, 8192, 28672, 64),
        8192,
        1602,
        719,
        tensor=4,
        pipeline=8,
        virtual=5,
        data=2,
        global_batch=128,
        recipe="fp8-tensorwise",
    ),
    _bridge(
        "Llama3.1-405B FP8 (TP8 PP8 CP2)",
        _llama(126, 16384, 53248, 128),
        8192,
        292,
        737,
        tensor=8,
        pipeline=8,
        virtual=8,
        context=2,
        data=8,
        global_batch=512,
        recipe="fp8-tensorwise",
    ),
    NEOBERT,
    STUDY,
)
