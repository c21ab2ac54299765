"""How often AdamW has updated each parameter: those without a gradient are skipped, and their count with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offload.gradient_stream import UnitGradient


class StepCounts:
    """Update counts by parameter. Several threads may count, each the parameters of its own units.

    Args:
        names: of all trained parameters.
        saved: what `to_meta` gave: the count of most, and those of the others.
    """

    def __init__(self, names: Sequence[str], saved: tuple[int, dict[str, int]]) -> None:
        default, exceptions = saved
        self._counts = {name: exceptions.get(name, default) for name in names}
        self._counted: set[str] = set()

    def begin_step(self) -> None:
        """From now on every parameter may be counted once more."""
        self._counted = set()

    def count(self, gradient: UnitGradient) -> dict[str, int]:
        """The counts of a unit's parameters that have a gradient, with this step's update; in one step it may be asked
        for again, as where an update is taken back."""
        for name in gradient.present - self._counted:
            self._counts[name] += 1
        self._counted |= gradient.present
        return {name: self._counts[name] for name in gradient.present}

    def to_meta(self) -> list[Any]:
        """For a commit."""
        counts = list(self._counts.values())
        default = max(set(counts), key=counts.count)
        return [default, {name: n for name, n in self._counts.items() if n != default}]
