"""Buffers that a unit's forward changes (running statistics): found, and put back while the unit runs again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Buffer:
    """A buffer that a unit's forward changed: where it hangs, and a copy of its value before."""

    owner: nn.Module
    name: str
    before: Tensor


class MutableBuffers:
    """Finds the buffers that a unit's forward changes (running statistics), so that running it again changes nothing.

    Every buffer is copied before the first training pass; later only those that were seen to change. Values are
    compared, because native kernels (batch norm) do not count their writes as versions.
    """

    def __init__(self, module: nn.Module) -> None:
        self._suspects = [(m, name) for m in module.modules() for name, b in m._buffers.items() if b is not None]

    def copies(self) -> list[tuple[Buffer, Tensor]]:
        """Each suspect before a forward: a copy, and the tensor itself."""
        return [
            (Buffer(m, name, b.detach().clone()), b)
            for m, name in self._suspects
            if (b := m._buffers[name]) is not None
        ]

    def changed(self, before: list[tuple[Buffer, Tensor]], training: bool) -> list[Buffer]:
        """Those that the forward wrote to or replaced."""
        found = [c for c, b in before if c.owner._buffers[c.name] is not b or not torch.equal(b, c.before)]
        if training:
            self._suspects = [(c.owner, c.name) for c in found]
        return found


@contextmanager
def as_before(changed: list[Buffer]) -> Iterator[None]:
    """Run with the buffers' earlier values in place of the present ones, and leave the present ones untouched."""
    present = [c.owner._buffers[c.name] for c in changed]
    for c in changed:
        c.owner._buffers[c.name] = c.before
    try:
        yield
    finally:
        for c, b in zip(changed, present, strict=True):
            c.owner._buffers[c.name] = b
