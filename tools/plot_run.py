"""Draw a run's loss curves, its phases shaded.

python tools/plot_run.py build/biphasic loss.png
"""

from pathlib import Path

from megatron_ext.errors import CommandLine, UserError, run_command
from megatron_ext.train.line_file import read_metrics

SHADES = {"clm": "#f4d9b8", "mlm": "#c7dcef", "mntp": "#d5e8cf"}
MIXTURE_SHADE = "#e3e3e3"


def main() -> None:
    """Read metrics.jsonl and write the picture."""
    parser = CommandLine(description="Draw a run's loss curves, its phases shaded.")
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("picture", type=Path, help="PNG, PDF or SVG to write")
    parser.add_argument("--baseline", type=float, help="draw a line at this loss, in nats: a unigram model, say")
    arguments = parser.parse_args()
    draw(read_metrics(arguments.run), arguments.picture, arguments.baseline)


def draw(lines: list[dict], picture: Path, baseline: float | None) -> None:
    """Training loss by phase, validation MLM loss, and the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = pyplot.Figure().canvas.get_supported_filetypes()
    if picture.suffix.removeprefix(".").lower() not in kinds:
        raise UserError(f"picture {picture}: its ending must be one of {', '.join(f'.{kind}' for kind in sorted(kinds))}")
    figure, axes = pyplot.subplots(figsize=(8, 4.2), dpi=150)
    training = [line for line in lines if "loss" in line and "phase" in line]
    if not training:
        raise UserError("the run has no training loss to draw yet")
    start = 0
    for phase in dict.fromkeys(line["phase"] for line in training):
        points = [line for line in training if line["phase"] == phase]
        objective = phase.partition("-")[2]
        axes.axvspan(start, points[-1]["step"], color=SHADES.get(objective, MIXTURE_SHADE), zorder=0)
        axes.plot([p["step"] for p in points], [p["loss"] for p in points], color="#444444", linewidth=1.2)
        middle = (start + points[-1]["step"]) / 2
        axes.annotate(objective.upper(), (middle, 0.95), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=12)
        start = points[-1]["step"]
    validation = [line for line in lines if "validation_mlm_loss" in line]
    steps = [line["step"] for line in validation]
    axes.plot(steps, [line["validation_mlm_loss"] for line in validation], "o-", color="#b2182b", linewidth=1.5, markersize=4)
    axes.plot([], [], color="#444444", label="training loss, under the phase's objective")
    axes.plot([], [], "o-", color="#b2182b", label="validation MLM loss")
    if baseline is not None:
        axes.axhline(baseline, color="#1b7837", linestyle="--", linewidth=1.2, label="unigram model, same positions")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per predicted token)", xlim=(0, start))
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.87), fontsize=8, framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture)
    except OSError as error:
        raise UserError(f"picture {picture} cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    run_command(main)
