"""How the property tests run: the same examples every time, so that a failure is found again."""

import copy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
"""Any text that UTF-8 can spell, control characters included."""


def examples(count: int) -> settings:
    """Settings with so many examples; no clock and no memory of earlier runs decides anything."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=unhurried)


def places(tree: Any, place: tuple = ()) -> list[tuple]:
    """The keys that lead to every value in a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place] * bool(place) + [below for key, value in inner for below in places(value, (*place, key))]


def changed(whole: Any, data: st.DataObject, value: Any, change: str) -> Any:
    """A copy of a tree with one value replaced or deleted, or one key added, wherever the example says."""
    tree = copy.deepcopy(whole)
    *above, last = data.draw(st.sampled_from(places(tree)))
    target = tree
    for key in above:
        target = target[key]
    if change == "delete":
        del target[last]
    elif change == "replace" or isinstance(target, list):
        target[last] = value
    else:
        target[data.draw(st.text(max_size=8))] = value
    return tree
