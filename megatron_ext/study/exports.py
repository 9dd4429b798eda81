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
        UserError: the export or its verification failed, or a checkpoint that is evaluated is not there.
    """
    made, missing = [], []
    for name, checkpoint in run.exports():
        folder = output_dir / "models" / name
        if folder.exists():
            continue
        if not checkpoint.is_dir():
            missing.append(str(checkpoint))
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        # It must not hold a half: the tool writes aside and renames.
        command = [sys.executable, str(TOOL), "export", str(checkpoint), str(folder), "--family", FAMILY]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the export of {name} ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
        say(f"exported: {folder}")
        made.append(folder)
    if missing:
        raise UserError(f"not there: {', '.join(missing)}; put into evaluation_steps after the segment had passed it")
    return made
