"""What the study's models cost on 1 to 4,096 GPUs in BF16: GPU-hours and days of 100B tokens, drawn."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import DataConfig, DataSource, MaskingConfig, ModelConfig, PhaseConfig, RunConfig, TrainingConfig
from megatron_ext.errors import UserError
from megatron_ext.plan.hardware import Gpu
from megatron_ext.plan.recommend import choose
from megatron_ext.plan.search import search

PRESETS = ("210m", "610m", "1b", "2b")
COLOURS = ("#1b7837", "#2166ac", "#b2182b", "#762a83")
TOKENS, SEQUENCE, GLOBAL_BATCH, RATIO = 100e9, 2048, 1024, 0.4
COUNTS = tuple(2**n for n in range(13))


@dataclass(frozen=True)
class Point:
    """The recommended way on so many GPUs."""

    gpus: int
    gpu_hours: float
    days: float
    layout: str


def cost_curve(preset: str, vocab_size: int, gpu: Gpu) -> list[Point]:
    """Cost of TOKENS tokens of MLM at a fixed global batch, for each number of GPUs on which something fits."""
    config = RunConfig(
        output_dir="curves",
        data=DataConfig(tokenizer="none", train=[DataSource(prefix="none")], sequence_length=SEQUENCE),
        model=ModelConfig(preset=preset),
        phases=[PhaseConfig(objective="mlm", tokens=int(TOKENS), masking=MaskingConfig(ratio=RATIO))],
        training=TrainingConfig(global_batch_size=GLOBAL_BATCH),
    )
    points = []
    for gpus in COUNTS:
        try:
            best = choose(search(config, vocab_size, gpus, gpu), fp8_pays=float("inf"))[0]
        except UserError:  # no layout for so many, or too little memory
            continue
        points.append(Point(gpus, best.seconds / 3600 * gpus, best.seconds / 86400, str(best.layout)))
    return points


def draw(curves: dict[str, list[Point]], gpu: Gpu, picture: Path) -> None:
    """Draw the curves of each model.

    Raises:
        UserError: the picture's ending is none that can be drawn, or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (cost, time) = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=150)
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    ticks = [digit * 10**power for power in range(-3, 6) for digit in (1, 2, 5)]
    for (preset, points), colour in zip(curves.items(), COLOURS, strict=False):
        counts = [point.gpus for point in points]
        for axes, name in ((cost, "gpu_hours"), (time, "days")):
            values = [getattr(point, name) for point in points]
            axes.plot(counts, values, "o-", color=colour, linewidth=1.6, markersize=3.5, label=preset.upper())
    for axes, label in ((cost, "GPU-hours"), (time, "days")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(COUNTS[::2])
        axes.xaxis.set_major_formatter(plain)
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in ticks if low <= tick <= high])
        axes.yaxis.set_major_formatter(plain)
        axes.minorticks_off()
        axes.margins(x=0.06)
        axes.set(xlabel=f"{gpu.name.upper()} GPUs", ylabel=label)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    cost.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    cost.set_title("what it costs", fontsize=11)
    time.set_title("how long it takes", fontsize=11)
    figure.suptitle(
        f"{TOKENS / 1e9:.0f}B tokens of MLM at {RATIO}, s {SEQUENCE}, global batch {GLOBAL_BATCH:,} "
        f"({GLOBAL_BATCH * SEQUENCE / 1e6:.1f}M tokens), BF16, the recommended layout each time - predicted, not measured",
        fontsize=9.5,
    )
    figure.tight_layout()
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {picture} cannot be written: {error}") from None


def render(curves: dict[str, list[Point]]) -> list[str]:
    """The points as a table."""
    return [
        f"{preset:6}{point.gpus:>6} GPUs {point.gpu_hours:>9,.0f} GPU-hours {point.days:>9.3f} days  {point.layout}"
        for preset, points in curves.items()
        for point in points
    ]
