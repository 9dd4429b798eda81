"""Entry point of pretraining: `torchrun --nproc-per-node 2 pretrain_encoder.py --config FILE.yaml [--section.field value ...]`."""

import sys

from megatron_ext.config_reading import load_config
from megatron_ext.errors import run_command
from megatron_ext.runtime.quick_start import without_garbage_collection


def main() -> int:
    """Parse the configuration and run the trainer, or show the configuration."""
    config, only_print = load_config(sys.argv[1:])
    if only_print:
        from megatron_ext.train.show import print_config

        print_config(config)
        return 0
    from megatron_ext.runtime.capabilities import check_apex
    from megatron_ext.runtime.compiler import leave_out_compiler

    check_apex()  # before the next line imports megatron-core, and with it whatever is called apex
    with without_garbage_collection():
        leave_out_compiler()
        from megatron_ext.train.trainer import train

    return train(config)


if __name__ == "__main__":
    # The guard matters: checkpoint writing starts processes that import this file.
    run_command(main)
