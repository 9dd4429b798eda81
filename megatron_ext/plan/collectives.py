"""Seconds of communication, hidden and exposed. Bytes are those of ring algorithms, as in `communication.py` for our own models."""

from dataclasses import dataclass

from megatron_ext.plan.execution import Execution
from megatron_ext.plan.hardware import NETWORK_SHARE, NVLINK_SHARE, Gpu
from megatron_ext.plan.kernels import Constants
from megatron_ext.plan.workload import Workload

LATENCY_IN_NODE, LATENCY_BETWEEN_NODES = 10e-6, 25e-6
"""Seconds of a collective however small; between nodes it grows with the logarithm of the nodes."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: how many, and how far apart neighbours are numbered."""

    size: int
    stride: int

    @property
    def share(self) -> float:
        """Part of the bytes that leaves each rank in a ring."""
        return (self.size - 1) / self.size

    def in_one_node(self, gpu: Gpu) -> bool:
        """NVLink alone connects them."""
        return self.size * self.stride <= gpu.gpus_per_node

    def bandwidth(self, gpu: Gpu) -> float:
        """Bytes/s of a ring: members in the same node share the network ports of all of them."""
        nvlink = gpu.nvlink * NVLINK_SHARE
        if self.in_one_node(gpu):
            return nvlink
        return min(nvlink, gpu.network * NETWORK_SHARE * max(1, gpu.gpus_per_node // self.stride))

    def seconds(self, gpu: Gpu, total_bytes: float, calls: float = 1.0) -> float:
        """All-gathers or reduce-scatters of this many bytes together (the whole, not each rank's part)."""
        if self.size == 1:
            return 0.0
        nodes = max(1, self.size * self.stride // gpu.gpus_per_node)
        latency = LATENCY_IN_NODE if nodes == 1 else LATENCY_BETWEEN_NODES * (1 + nodes.bit_length())
        return self.share * total_bytes / self.bandwidth(gpu) + calls * latency


def tensor_seconds(gpu: Gpu, constants: Constants, work: Workload, run: Execution) -> float:
    """Exposed tensor-parallel communication of one layer and one micro-batch."""
    group = Group(run.tensor, 1)
    if run.tensor == 1:
        return 0.0
    stream = 2 * run.micro_batch * work.sequence / run.context * work.shape.hidden
    # four gathers and four scatters; with sequence parallelism two inputs are gathered once more for the weights' gradients
    calls = 8 + 2 * run.sequence_parallel + 4 * (run.recompute == "full")
    seconds = group.seconds(gpu, calls * stream, calls)
    return seconds * (constants.exposed if run.overlap_tensor else 1.0)


def context_seconds(gpu: Gpu, work: Workload, run: Execution) -> float:
    """Gathering keys and values of one layer and one micro-batch: forward, and their gradients back. Nothing hides it."""
    group = Group(run.context, run.tensor)
    keys_and_values = 2 * 2 * run.micro_batch * work.sequence * work.shape.key_width / run.tensor
    calls = 2 + (run.recompute != "none")
    return group.seconds(gpu, calls * keys_and_values, calls)


def pipeline_seconds(gpu: Gpu, constants: Constants, work: Workload, run: Execution) -> float:
    """Exposed sending between stages of one micro-batch, both directions; interleaving hides it in part."""
    if run.pipeline == 1:
        return 0.0
    neighbour = Group(2, run.tensor * run.context * run.data)
    stream = 2 * run.micro_batch * work.sequence / run.context * work.shape.hidden
    stream /= run.tensor if run.sequence_parallel else 1
    near = neighbour.in_one_node(gpu)
    rate = gpu.nvlink * NVLINK_SHARE if near else gpu.network * NETWORK_SHARE
    seconds = 2 * run.virtual * (stream / rate + (LATENCY_IN_NODE if near else LATENCY_BETWEEN_NODES))
    return seconds * (constants.exposed if run.virtual > 1 else 1.0)


def data_seconds(gpu: Gpu, constants: Constants, run: Execution, parameters: float, forward: float, backward: float) -> float:
    """Exposed communication of gradients and weights in one step.

    Args:
        gpu: the GPU.
        constants: fitted constants.
        run: how the model is trained.
        parameters: on one rank.
        forward: seconds of one micro-batch's forward pass, which can hide the gathering of weights.
        backward: seconds of its backward pass, which can hide the reduction of gradients.
    """
    group = Group(run.data * run.context, run.tensor)
    if group.size == 1:
        return 0.0
    if run.sharded_weights:
        gather = group.seconds(gpu, run.gathered_bytes * parameters, calls=30)
        reduce = group.seconds(gpu, 2 * parameters, calls=30)
        exposed = _exposed(constants, gather, forward) + _exposed(constants, gather + reduce, backward)
        return run.micro_batches * exposed
    reduce = group.seconds(gpu, 4 * parameters, calls=8)
    gather = group.seconds(gpu, (2 if run.distributed_optimizer else 4) * parameters, calls=8)
    if not run.distributed_optimizer:  # an all-reduce is both, in float32
        return _exposed(constants, reduce + gather, backward) if run.overlap_reduce else reduce + gather
    exposed = _exposed(constants, reduce, backward) if run.overlap_reduce else reduce
    return exposed + (_exposed(constants, gather, forward) if run.overlap_gather else gather)


def _exposed(constants: Constants, seconds: float, hiding: float) -> float:
    """What shows of communication beside this much arithmetic: a share of it always, and what does not fit."""
    shown = constants.exposed * seconds
    return shown + max(0.0, seconds - shown - hiding)
