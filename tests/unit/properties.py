"""How the property tests run: the same examples every time, so that a failure is found again."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
"""Any text that UTF-8 can spell, control characters included."""


def examples(count: int) -> settings:
    """Settings with so many examples; no clock and no memory of earlier runs decides anything."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=unhurried)
