"""Shows a resolved configuration without loading the training stack."""

import yaml

from megatron_ext.config import RunConfig
from megatron_ext.model.presets import build_encoder_config
from megatron_ext.objective import PhasePlan


def config_as_yaml(config: RunConfig) -> str:
    """YAML that reads back as this configuration, but for what is secret; what a terminal would not show is escaped."""
    text = yaml.safe_dump(config.public_dict(), sort_keys=False, allow_unicode=True)
    if not text.replace("\n", "").isprintable():
        text = yaml.safe_dump(config.public_dict(), sort_keys=False, allow_unicode=False)
    return text


def print_config(config: RunConfig) -> None:
    """Show the resolved configuration as YAML, with what follows from it in comments.

    Raises:
        UserError: the phases or sizes do not fit together.
    """
    plan = PhasePlan.from_config(config)
    print(config_as_yaml(config), end="")
    print(f"# model: {build_encoder_config(config.model)}")
    for phase in plan.phases:
        print(f"# phase {phase.name}: steps {phase.start_step} to {phase.end_step}")
