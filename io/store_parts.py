"""Making and opening a store's files: everything that has to be there before the first request."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import files, manifest
from .backend import Backend
from .choose import check, open_backend
from .content import Content
from .directfile import DirectFile
from .errors import StoreError
from .faults import ENVIRONMENT, FaultyBackend, parse_rules
from .manifest import Extent, StorePath
from .manifest_file import manifest_room


@dataclass(frozen=True)
class StoreParts:
    """What a store works with. `written`: bytes to each path in earlier processes; `version` 0: nothing committed."""

    directories: files.Directories
    paths: tuple[StorePath, ...]
    name: str
    contents: dict[str, Content]
    data: tuple[DirectFile, ...]
    backend: Backend
    written: Sequence[int]
    version: int = 0
    meta: dict[str, Any] = field(default_factory=dict)


def create(
    paths: Sequence[StorePath], name: str, extents: Sequence[Extent], backend: str, record: Path | None, timeout: float
) -> StoreParts:
    """See Store.create."""
    keys = [extent.key for extent in extents]
    if len(set(keys)) != len(keys) or not keys:
        raise StoreError(f"store '{name}': needs at least one extent, and each key once")
    located = files.normalized(paths, name)
    placed, used = manifest.place(extents, [item.size for item in located], [item.bandwidth for item in located])
    make = _backend_maker(backend, record, timeout)
    directories = files.Directories.create(located, name)
    try:
        data = directories.reserve(used)
        # a manifest has a side bit and a checksum for each block, the extents' names, and what the caller adds
        directories.keep_room(manifest_room(sum(len(item.key) + 100 + 12 * item.blocks for item in extents)))
        moving = make(directories, sum(used))
    except BaseException:
        directories.remove()
        raise
    contents = {extent.key: Content(extent, placed[extent.key]) for extent in extents}
    for content in contents.values():
        if content.extent.durable:
            content.set_zero()
    return StoreParts(directories, located, name, contents, tuple(data), moving, [0] * len(located))


def open_committed(
    paths: Sequence[StorePath],
    name: str,
    backend: str,
    record: Path | None,
    timeout: float,
    *,
    reserve: bool = True,
) -> StoreParts:
    """See Store.open. Without `reserve` nothing is allocated: for a look at it."""
    given_paths = files.normalized(paths, name)
    make = _backend_maker(backend, record, timeout)
    if not exists(given_paths, name):
        manifest.load(given_paths[0].path / name)  # says why
    directories = files.Directories.open(given_paths, name)
    try:
        committed = manifest.load(directories.first)
        if committed.name != name or len(committed.paths) != len(given_paths):
            raise StoreError(
                f"the store was created as '{committed.name}' on {len(committed.paths)} paths "
                f"({', '.join(str(item.path) for item in committed.paths)}), not as '{name}' on {len(given_paths)}",
                path=directories.first,
            )
        placed, used = committed.place()
        data = directories.open_data(used, reserve)
        moving = make(directories, sum(used))
    except BaseException:
        directories.release()
        raise
    contents = {extent.key: Content(extent, placed[extent.key]) for extent in committed.extents}
    for key, sides in committed.sides.items():
        contents[key].set_committed(sides, committed.checksums[key])
    located = tuple(
        replace(known, path=given.path, tbw=given.tbw or known.tbw)
        for given, known in zip(given_paths, committed.paths, strict=True)
    )
    return StoreParts(
        directories,
        located,
        name,
        contents,
        tuple(data),
        moving,
        committed.written,
        committed.version,
        committed.meta,
    )


def exists(paths: Sequence[StorePath], name: str) -> bool:
    """See Store.exists."""
    return (files.normalized(paths, name)[0].path / name / manifest.MANIFEST).is_file()


def _backend_maker(kind: str, record: Path | None, timeout: float) -> Callable[[files.Directories, int], Backend]:
    """Checks the choice of a backend, and the fault rules of the environment, before anything is touched."""
    check(kind)
    rules = os.environ.get(ENVIRONMENT, "")
    parse_rules(rules)

    def make(directories: files.Directories, nbytes: int) -> Backend:
        backend = open_backend(kind, directories.all, nbytes, record=record, timeout=timeout)
        return FaultyBackend(backend, rules) if rules else backend

    return make
