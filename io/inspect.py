"""Looking at stores from outside: find them under a path, list what they hold, and verify every block.

Nothing is written but its lock: no backend is measured, nothing is allocated. A store that a process uses is listed
from its manifest, which is replaced as a whole, but not verified: its blocks change meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import manifest
from .endurance import drives
from .errors import StoreError, StoreLocked
from .files import HOME
from .manifest import Extent, Manifest, StorePath
from .store import Store
from .store_parts import open_committed

TIMEOUT = 120.0
"""Seconds without progress after which the drive counts as hung."""


def find(path: Path) -> list[Path]:
    """The directories with a store's manifest at, or directly under, `path`; one that was never committed counts too.
    Of a store on several paths it is the first one's. What may not be looked into is passed over."""
    found: list[Path] = []
    for directory in [path, *sorted(path.iterdir() if path.is_dir() else ())]:
        home = directory / HOME
        first = directory
        if not os.path.isfile(directory / manifest.MANIFEST) and os.path.isfile(home):
            named = Path(home.read_text(encoding="utf-8"))
            first = named if os.path.isfile(named / HOME) else directory
        if first not in found and any(os.path.isfile(first / name) for name in (manifest.MANIFEST, HOME)):
            found.append(first)
    return found


def examine(directory: Path, verify: bool = True) -> dict[str, Any]:
    """What the store in `directory` (see find) holds, and with `verify` what is wrong with it; sizes in bytes.

    Keys: name, directory, state ("committed", "never committed", "in use", "damaged"), version, paths (path,
    size, used, free, written, tbw, used_share), extents (key, nbytes, sides, durable, bytes_on_paths), roles (by what
    follows the first "/" of the keys: extents, nbytes, sides, padded), problems (one text each), and verified (bytes,
    seconds, cpu_seconds) or None.
    """
    found: dict[str, Any] = {
        "name": directory.name, "directory": str(directory), "state": "committed", "version": 0, "paths": [],
        "extents": [], "roles": {}, "problems": [], "verified": None,
    }  # fmt: skip
    if not (directory / manifest.MANIFEST).is_file():
        return found | {"state": "never committed"}
    try:
        known = manifest.load(directory)
        found |= _listed(known, directory)
        if verify:
            found |= _verified(known, directory)
    except StoreLocked as error:
        found |= {"state": "in use", "note": str(error)}
    except StoreError as error:
        found |= {"state": "damaged", "problems": [*found["problems"], str(error)]}
    return found


def _listed(known: Manifest, directory: Path) -> dict[str, Any]:
    placed, used = known.place()
    extents = []
    for extent in known.extents:
        on = [0] * len(known.paths)
        for side in placed[extent.key]:
            for block, path in enumerate(side.files.tolist()):
                on[path] += min(manifest.BLOCK, extent.padded - block * manifest.BLOCK)
        extents.append(
            {
                "key": extent.key, "nbytes": extent.nbytes, "sides": extent.sides, "durable": extent.durable,
                "bytes_on_paths": on,
            }
        )  # fmt: skip
    located = list(_located(known, directory))
    paths = [
        {"size": item.size, "used": size, "free": item.size - size, "bandwidth": item.bandwidth} | drive
        for item, size, drive in zip(located, used, drives(located, known.written), strict=True)
    ]
    roles: dict[str, dict[str, int]] = {}
    for extent in known.extents:
        role = roles.setdefault(_role(extent), {"extents": 0, "nbytes": 0, "padded": 0, "on_paths": 0})
        role["extents"] += 1
        role["nbytes"] += extent.nbytes
        role["padded"] += extent.padded
        role["on_paths"] += extent.padded * extent.sides
    return {"name": known.name, "version": known.version, "paths": paths, "extents": extents, "roles": roles}


def _role(extent: Extent) -> str:
    return extent.key.partition("/")[2] or extent.key


def _located(known: Manifest, directory: Path) -> Iterator[StorePath]:
    """The paths of the store, the first where it was found."""
    for index, item in enumerate(known.paths):
        yield StorePath(directory.parent if index == 0 else item.path, item.size, item.bandwidth, item.tbw)


def _verified(known: Manifest, directory: Path) -> dict[str, Any]:
    parts = open_committed(list(_located(known, directory)), known.name, "threads", None, TIMEOUT, reserve=False)
    with Store(parts) as store:
        began, cpu = time.perf_counter(), time.process_time()
        problems = store.verify()
        verified = {
            "bytes": sum(extent.padded for extent in known.extents if extent.durable),
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
        }
    return {"state": "damaged" if problems else "committed", "problems": problems, "verified": verified}
