"""Whether a boundary activation may leave the device: whether anything but the tape still refers to it.

Python's and torch's own reference counts say so; they are compared with what the tape is known to hold.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.unit_pass import Record

# Boundary activations smaller than this stay where they are.
SMALLEST = 64 * 1024


def _references(values: Sequence[object], i: int) -> int:
    return sys.getrefcount(values[i])


def _storage_uses(x: Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def is_unused(leaves: Sequence[object], i: int, tape: Sequence[Record]) -> bool:
    """Whether output `leaves[i]` of the first of these records is referred to by the tape alone.

    Then no frame of the model's forward can read it again, no view of it exists, and no graph of the glue saved it.
    `tape` has to hold every record that can have it as an input.
    """
    x = leaves[i]
    if not torch.is_tensor(x) or not x.requires_grad or x.untyped_storage().nbytes() < SMALLEST:
        return False
    if x._use_count() > 1 or not x.untyped_storage().resizable():  # type: ignore[attr-defined]
        return False
    key, storage = id(x), x.untyped_storage()._cdata
    uses = _storage_uses(x)
    del x
    known: Counter[int] = Counter()
    aliases = 0
    for record in tape:
        known.update(map(id, record.inputs))
        known.update(map(id, record.leaves))
        known.update(id(entry[2]) for entry in record.side)
        if record.saved is not None:
            known.update(record.saved.owners())
        for held in record.kept or ():
            aliases += sum(1 for t in held if torch.is_tensor(t) and t.untyped_storage()._cdata == storage)
    return _references(leaves, i) == known[key] + _OWN_REFERENCES and uses == aliases + _OWN_USES


_probe = [torch.empty(1)]
# What the questions themselves add: a list's reference is one of those that are counted.
_OWN_REFERENCES = _references(_probe, 0) - 1
_OWN_USES = _storage_uses(_probe[0])
del _probe
