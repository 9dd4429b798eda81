"""Where a run's first weights come from if not from the seed: another checkpoint, imported or trained; and what it inherits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint_files import read_run_file
from megatron_ext.config import RunConfig
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError

INHERITED = {"parent": None, "lineage": [], "imported": None, "changes": []}
"""Keys of `run.json` that pass from checkpoint to checkpoint, with their values for a run that begins with drawn weights."""

ANCESTRY = (
    *("created", "step", "phase", "phases", "samples", "tokens", "predicted_tokens", "flops"),
    *("data", "mlflow_run_id", "parent"),
)
"""What `run.json` keeps of a checkpoint whose weights a run began with."""


@dataclass(frozen=True)
class Start:
    """The checkpoint named by `model.checkpoint`."""

    checkpoint: Path
    record: dict[str, Any]
    """Its `run.json`."""

    def inheritance(self) -> dict[str, Any]:
        """What a run that begins here says of where it comes from: see `INHERITED`."""
        ancestor = {"checkpoint": str(self.checkpoint), **{name: self.record.get(name) for name in ANCESTRY}}
        return {
            "parent": as_parent(self.checkpoint, self.record),
            "lineage": [*self.record.get("lineage", []), ancestor],
            "imported": self.record.get("imported"),
            "changes": [],
        }


def as_parent(checkpoint: Path, record: dict[str, Any]) -> dict[str, Any]:
    """How `run.json` and the tracker name a checkpoint of another run."""
    return {"checkpoint": str(checkpoint), "step": record["step"], "mlflow_run_id": record["mlflow_run_id"]}


def find_start(config: RunConfig, tokenizer: Tokenizer) -> Start | None:
    """The checkpoint that `model.checkpoint` names, if it names one.

    Raises:
        UserError: it is none, or its embedding belongs to another tokenizer.
    """
    if config.model.checkpoint is None:
        return None
    checkpoint = Path(config.model.checkpoint)
    record = read_run_file(checkpoint)
    theirs = record["tokenizer"]["fingerprint"]
    if theirs != tokenizer.fingerprint:
        raise UserError(
            f"model.checkpoint {checkpoint} belongs to another tokenizer (fingerprint {theirs[:12]}) than data.tokenizer "
            f"{tokenizer.source} ({tokenizer.fingerprint[:12]}); its own is {checkpoint / record['tokenizer']['path']}"
        )
    return Start(checkpoint, record)
