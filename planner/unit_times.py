"""What timing units has found, kept per machine: (forward, backward) seconds by unit name."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from offload.planner.bounds import UnitModules
from offload.planner.measure import cache_directory, machine_key
from offload.planner.tracer import signature
from torch import nn

_VERSION = 2


def key_of(
    model: nn.Module,
    units: Sequence[UnitModules],
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: str,
    backward: bool,
    large: Sequence[str],
) -> str:
    """What the times belong to: machine, shapes, and units told apart as the profile does."""
    kinds = sorted({repr(signature(m, [], pytree.tree_flatten(())[1])) for _, _, modules in units for m in modules})
    parts = [_VERSION, machine_key(device, {}), type(model).__name__, rows, length, str(dtype), device, *kinds]
    parts.append([(kind, len(modules)) for _, kind, modules in units])
    if not backward:
        parts.append("forward only")
    if large:
        parts.append(("unrun", *large))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _path(key: str) -> Path:
    return cache_directory() / f"units-{key}.json"


def load(key: str) -> dict[str, tuple[float, float]] | None:
    """What was saved; None if nothing was, or nothing that can be read."""
    try:
        return {name: (float(a), float(b)) for name, (a, b) in json.loads(_path(key).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # nothing there, or written by something else
        return None


def save(key: str, found: Mapping[str, tuple[float, float]]) -> None:
    """Keep it for the next run, all of it or nothing."""
    try:
        _path(key).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_path(key).parent, suffix=".tmp", delete=False) as file:
            json.dump(found, file)
        os.replace(file.name, _path(key))
    except OSError:
        pass  # a home that cannot be written costs the next run a moment, nothing else
