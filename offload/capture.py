"""The one place that touches transformers' private output collector.

Models that return router logits, attentions or hidden states collect them, through a context variable, from inside
blocks. A tensor collected inside a unit is an output of that unit, so the boundary has to see it.
`tests/test_boundary.py` checks this adapter against the installed transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import output_capturing

Collected = dict[str, Any]


def active() -> Collected | None:
    """The collector of the forward that is running in this context, or None."""
    return output_capturing._active_collector.get()


def lengths(collector: Collected | None) -> dict[str, int]:
    """How many tensors each collected key holds now."""
    return {k: len(v) for k, v in (collector or {}).items() if isinstance(v, list)}


@contextmanager
def recapture(keys: list[str] | None) -> Iterator[Collected]:
    """Run a unit again with a fresh collector of the same keys, so that what it collects can be matched."""
    fresh: Collected = {k: [] for k in keys or []}
    token = output_capturing._active_collector.set(fresh if keys is not None else None)
    try:
        yield fresh
    finally:
        output_capturing._active_collector.reset(token)
