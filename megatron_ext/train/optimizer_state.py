"""Lets a checkpoint of any of megatron's optimizers be loaded by any other: plain or distributed, float32 or bf16.

They store the same moments under the same keys, but differ in where they keep the float32 master weights and in the shape of
the part that is not tensors. Of that part only the step count matters: learning rate and weight decay are set at every step.
"""

from collections.abc import Iterator
from typing import Any

MASTER_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Where the distributed and the plain bf16 optimizer keep master weights; the float32 one trains the weights themselves."""


def redirect_master_weights(wanted: dict[str, Any], stored_keys: set[str]) -> None:
    """Let master weights that the checkpoint does not hold be read from where it holds them.

    Args:
        wanted: the optimizer's sharded state, to be filled; changed in place.
        stored_keys: keys of the checkpoint's tensors.
    """
    for tensor in _sharded(wanted):
        for prefix in MASTER_PREFIXES:
            if tensor.key.startswith(prefix) and tensor.key not in stored_keys:
                name = tensor.key.removeprefix(prefix)
                places = [*(other + name for other in MASTER_PREFIXES), name]
                tensor.key = next((place for place in places if place in stored_keys), tensor.key)
                if tensor.key == name:
                    tensor.replica_id = (1,) * len(tensor.replica_id)  # the model reads this key too, as its first replica
                break


def adapt_loaded_state(loaded: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The loaded state in the shape that this optimizer takes.

    Args:
        loaded: what was read, its plain part shaped by the optimizer that saved it.
        optimizer: the one that will load it.
    """
    groups = loaded.get("optimizer", loaded).get("param_groups") or loaded["param_groups"]
    steps = {group["step"] for group in groups if "step" in group}
    assert len(steps) == 1, f"the checkpoint's optimizer groups have the steps {steps}"
    step = steps.pop()
    own = optimizer.state_dict()
    nested = "optimizer" in own
    own_groups = (own["optimizer"] if nested else own)["param_groups"]
    adapted = {key: value for key, value in loaded.items() if key not in ("optimizer", "param_groups")}
    if nested:
        inner = {key: value for key, value in loaded.get("optimizer", {}).items() if key != "param_groups"}
        adapted["optimizer"] = {**inner, "param_groups": [{**group, "step": step} for group in own_groups]}
    else:
        adapted["param_groups"] = [{**group, "step": step} for group in own_groups]
    return adapted


def _sharded(tree: Any) -> Iterator[Any]:
    """megatron's ShardedTensors and their factories in a nested state."""
    if hasattr(tree, "key"):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _sharded(value)
