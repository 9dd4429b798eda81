"""What a checkpoint's `run.json` says of how far the run is."""

from typing import Any

from megatron_ext.objective import OBJECTIVES
from megatron_ext.train.changes import comparison_ratio
from megatron_ext.train.preflight import RunSetup


def progress_record(setup: RunSetup, step: int) -> dict[str, Any]:
    """Step, phase and plan after `step` completed steps."""
    phase = setup.plan.phase_at(step - 1)
    return {
        "step": step,
        "phase": phase.name,
        "causal": all(OBJECTIVES[name].causal for name in phase.weights),
        "phases": [
            {
                "name": p.name,
                "start_step": p.start_step,
                "end_step": p.end_step,
                "objectives": p.weights,
                "masking": vars(p.masking),
            }
            for p in setup.plan.phases
        ],
        "comparison_mask_ratio": comparison_ratio(setup),
    }
