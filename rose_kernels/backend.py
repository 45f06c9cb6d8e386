"""Which implementation serves each operator on each kind of device."""

from __future__ import annotations

OPERATORS = ("inject", "aggregate_step_", "target_nll", "rank_update_")


def backends() -> dict[str, dict[str, str]]:
    """operator -> device type -> the name of what serves it."""
    return {operator: {"cpu": "reference", "cuda": "reference"} for operator in OPERATORS}
