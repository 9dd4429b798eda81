"""One rank of `benchmarks.parallel`: a step of this project on made-up micro-batches whenever rank 0 is told to.

torchrun --nproc-per-node 2 -m benchmarks.rank --shape tiny --objective mlm --tensor 2 --micro-batches 4
"""

import argparse
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

from benchmarks.alternating import take_turns
from benchmarks.contenders import SHAPES, contending_step, encoder_of, own_micro_batch
from benchmarks.own_run import own_groups
from megatron_ext.errors import run_command


def main() -> int:
    """Build this rank's part and take turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--objective", choices=("mlm", "clm"), required=True)
    parser.add_argument("--micro-batches", type=int, required=True, help="of all data-parallel ranks together, in a step")
    for size in ("tensor", "pipeline", "context"):
        parser.add_argument(f"--{size}", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with ExitStack() as stack:
        step = build(arguments, stack)
        _obey(step, {"threads": torch.get_num_threads(), "ranks": torch.distributed.get_world_size()})
    return 0


def build(arguments: argparse.Namespace, stack: ExitStack) -> Any:
    """This rank's step: it takes nothing and returns its sums."""
    import torch

    from megatron_ext.config import ParallelConfig
    from megatron_ext.runtime.allocator import keep_freed_memory
    from megatron_ext.runtime.topology import world_size_from_environment

    keep_freed_memory()
    shape = SHAPES[arguments.shape]
    encoder = encoder_of(shape)
    sizes = {name: getattr(arguments, name) for name in ("tensor", "pipeline", "context")}
    data = world_size_from_environment() // (arguments.tensor * arguments.pipeline * arguments.context)
    count = arguments.micro_batches // data
    layout, backend = stack.enter_context(own_groups(encoder, shape.batch_size, count, ParallelConfig(**sizes)))
    step = contending_step(encoder, shape.vocab_size, layout, backend)
    first = torch.distributed.get_rank() * count if data > 1 else 0
    batches = [own_micro_batch(shape, arguments.objective, seed) for seed in range(first, first + count)]
    return lambda: step(batches)


def _obey(step: Any, about: dict[str, Any]) -> None:
    """Rank 0 reads the commands and hands them on; the others wait for it."""
    from torch import distributed

    def together() -> dict[str, Any]:
        distributed.broadcast_object_list(["step"])
        distributed.barrier()
        start = time.perf_counter()
        sums = step().reduce()
        distributed.barrier()
        return {"seconds": time.perf_counter() - start, "loss": sum(sums.losses.values()) / sum(sums.predicted.values())}

    if distributed.get_rank() == 0:
        take_turns(about, together)
        distributed.broadcast_object_list(["end"])
        return
    while True:
        word = [None]
        distributed.broadcast_object_list(word)
        if word == ["end"]:
            return
        distributed.barrier()
        step().reduce()
        distributed.barrier()


if __name__ == "__main__":
    sys.exit(run_command(main))
