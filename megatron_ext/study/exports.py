"""Hugging Face folders of a study's models, all of one architecture: evaluation lets every model see both ways."""

import subprocess
import sys
from pathlib import Path

from megatron_ext.errors import UserError, say
from megatron_ext.study.segment_run import SegmentRun

FAMILY = "eurobert"
TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"


def export(run: SegmentRun, output_dir: Path) -> list[Path]:
    """Export what is evaluated of a finished segment, unless it was before: `<output_dir>/models/<name>`.

    Raises:
        UserError: of what was not exported, when all else is: the export or its verification failed, a checkpoint that is evaluated
            is not there, or the folder was made of another segment.
    """
    made, missing, failed = [], [], []
    for name, checkpoint in run.exports():
        folder = output_dir / "models" / name
        origin, source = output_dir / "origins" / name, f"{run.name} {checkpoint.name}"
        if folder.exists():
            before = origin.read_text() if origin.exists() else source
            if before != source:
                failed.append(f"{folder} was made of {before}, and is of {source} in this study: move it away")
            continue
        if not checkpoint.is_dir():
            missing.append(str(checkpoint))
            continue
        for parent in (folder.parent, origin.parent):
            parent.mkdir(parents=True, exist_ok=True)
        # It must not hold a half: the tool writes aside and renames.
        command = [sys.executable, str(TOOL), "export", str(checkpoint), str(folder), "--family", FAMILY]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failed.append(f"the export of {name} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
            continue
        origin.write_text(source)
        say(f"exported: {folder}")
        made.append(folder)
    if missing:
        failed.append(f"not there: {', '.join(missing)}; put into evaluation_steps after the segment had passed it")
    if failed:
        raise UserError("; ".join(failed))
    return made
