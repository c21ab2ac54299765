"""What a crash can leave of a store: processes killed at any moment, and recorded operations replayed as a power cut
may leave them.

A kill loses nothing that the kernel has taken, so it cannot show a missing fsync. For that, `Recorder` notes every
write, sync, rename, creation and deletion under a directory as the system calls happen, and `crash_states` builds from
them the directories that a power cut may leave: what was synced is there, and of what was not, any part is. After
Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from offload.io import BLOCK, PAGE, Extent, Ledger, Store, StorePath, allocate

SECTOR = 512  # bytes that a drive writes whole


def fill(tensor: torch.Tensor, value: int) -> None:
    """Bytes that differ between values; zeros for 0, as an extent that was never written."""
    words = torch.arange(tensor.numel() // 8, dtype=torch.int64) * 7919 + value
    tensor.view(torch.int64).copy_(words * bool(value))


def check_contents(store: Store, values: dict[str, list[int]]) -> None:
    """Every block of the store holds its value."""
    assert store.verify() == []
    for key, wanted in values.items():
        with allocate(store.padded(key), Ledger()) as got, allocate(BLOCK, Ledger()) as expected:
            store.read(key, 0, got.tensor).wait()
            for block, value in enumerate(wanted):
                part = got.tensor[block * BLOCK : (block + 1) * BLOCK]
                fill(expected.tensor[: len(part)], value)
                assert torch.equal(part, expected.tensor[: len(part)]), (store.version, key, block)


def write_blocks(store: Store, key: str, first: int, last: int, value: int, values: dict[str, list[int]]) -> None:
    """Write blocks [first, last) of an extent, each with a value of its own, and note it."""
    size = min(last * BLOCK, store.padded(key)) - first * BLOCK
    with allocate(size, Ledger()) as buffer:
        for block in range(first, last):
            fill(buffer.tensor[(block - first) * BLOCK : (block - first + 1) * BLOCK], value + block)
            values[key][block] = value + block
        store.write(key, first * BLOCK, buffer.tensor).wait()


# ---- killed processes ----

EXTENTS = (
    Extent("large", BLOCK + 5000, 2, True),
    *(Extent(f"small{index}", 1 + 3000 * index, 2, True) for index in range(4)),
    Extent("frozen", 5000, 1, True),
    Extent("scratch", 9000, 1, False),
)
UPDATED = [extent for extent in EXTENTS if extent.sides == 2]


def _operate(paths: Sequence[StorePath], seed: int, done: Callable[[int], None]) -> None:
    """Random operations for ever; done(version) after each, with the last version whose commit returned."""
    rng = random.Random(seed)
    store = Store.open(paths, "run") if Store.exists(paths, "run") else Store.create(paths, "run", EXTENTS)
    values = store.meta.get("values") or {extent.key: [0] * extent.blocks for extent in UPDATED}
    while True:
        what = rng.random()
        if what < 0.7:
            extent = rng.choice(UPDATED if rng.random() < 0.1 else UPDATED[1:])
            first = rng.randrange(extent.blocks)
            last = rng.randint(first + 1, extent.blocks)
            write_blocks(store, extent.key, first, last, rng.randrange(1, 1 << 40), values)
            store.publish(extent.key)
        elif what < 0.78:
            write_blocks(store, "scratch", 0, 1, 1, {"scratch": [0]})
        elif what < 0.97:
            store.commit({"values": values})
        elif store.version:
            store.close()
            store = Store.open(paths, "run")
            values = store.meta["values"]
        done(store.version)


@dataclass
class Killed:
    """What `kill_at_random` did."""

    operations: int = 0
    kills: int = 0
    commits: int = 0
    torn: int = 0
    """Kills after a manifest was in place and before its commit had returned."""


def kill_at_random(paths: Sequence[StorePath], operations: int, seed: int) -> Killed:
    """Run random operations in processes that are killed at random moments until `operations` were done; after each
    kill the store must open at the version whose commit returned last or was under way, with its contents."""
    rng, result, version = random.Random(seed), Killed(), 0
    shared = mmap.mmap(-1, PAGE)
    while result.operations < operations:
        shared[:16] = bytes(16)
        child_seed = rng.randrange(1 << 40)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                count = 0

                def done(version: int) -> None:
                    nonlocal count
                    count += 1
                    shared[:16] = struct.pack("qq", count, version)

                _operate(paths, child_seed, done)
            finally:
                os._exit(status)
        enough, late = min(rng.randint(1, 60), operations - result.operations), rng.uniform(0.0, 0.004)
        deadline = time.monotonic() + 60
        while struct.unpack_from("q", shared)[0] < enough and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(late)
        os.kill(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended == -signal.SIGKILL, f"the process ended by itself: {ended}"
        count, returned = struct.unpack_from("qq", shared)
        assert count >= enough, f"{count} operations in 60 s"
        result.operations += count
        result.kills += 1
        last = max(version, returned)
        if not Store.exists(paths, "run"):
            assert last == 0
            continue
        with Store.open(paths, "run") as store:
            assert store.version in (last, last + 1), (store.version, last)
            check_contents(store, store.meta["values"])
            result.torn += store.version == last + 1
            result.commits += store.version - version
            version = store.version
    return result


# ---- recorded operations ----


@dataclass
class Operation:
    """One recorded call. `inode` is the file it touches, `path` and `target` the names it changes; `began` and `ended`
    are positions in the recording: a sync that began at or after the end of a write makes it durable."""

    kind: str  # create, unlink, rename, mkdir, rmdir, write, size, sync, syncdir, mark
    path: str = ""
    target: str = ""
    inode: int = -1
    offset: int = 0
    data: bytes = b""
    began: int = 0
    ended: int = 1 << 60
    value: Any = None


@dataclass
class Recorder:
    """Records the calls of this process, from all its threads, that change anything under `root`, while it is open."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    _files: dict[int, tuple[str, int]] = field(default_factory=dict)  # descriptor to path and inode
    _inodes: dict[str, int] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def mark(self, value: Any) -> None:
        """Note what the program knows at this point."""
        self._add(Operation("mark", value=value))

    def _add(self, operation: Operation) -> Operation:
        with self._lock:
            operation.began = len(self.operations)
            self.operations.append(operation)
            return operation

    def _end(self, operation: Operation) -> None:
        with self._lock:
            operation.ended = len(self.operations)

    def _inside(self, path: Any) -> str | None:
        text = os.path.abspath(os.fspath(path))
        return text if text == str(self.root) or text.startswith(f"{self.root}{os.sep}") else None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Watch the functions of `os`. Everything the store does goes through them with backend "threads";
        `final_state` proves that nothing was missed."""
        real = {
            name: getattr(os, name)
            for name in (
                "open", "close", "pwrite", "pwritev", "write", "ftruncate", "truncate", "posix_fallocate", "fsync",
                "fdatasync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir",
            )
        }  # fmt: skip

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            name = self._inside(path)
            with self._lock:
                new = name is not None and not os.path.exists(name)
                fd: int = real["open"](path, flags, *args, **kwargs)
                if name is not None:
                    if new:
                        self._inodes[name] = len(self.operations)
                        self._end(self._add(Operation("create", name, inode=self._inodes[name])))
                    elif flags & os.O_TRUNC:
                        self._end(self._add(Operation("size", inode=self._inodes[name], offset=0)))
                    self._files[fd] = name, self._inodes.get(name, -1)
            return fd

        def closed(fd: int) -> None:
            with self._lock:
                self._files.pop(fd, None)
                real["close"](fd)

        def written(name: str) -> Callable[..., int]:
            def call(fd: int, data: Any, *args: Any) -> int:
                known = self._files.get(fd)
                if known is None:
                    return int(real[name](fd, data, *args))
                assert name != "write", "only positioned writes are recorded"
                raw = b"".join(bytes(part) for part in (data if name == "pwritev" else [data]))
                operation = self._add(Operation("write", inode=known[1], offset=args[0], data=raw))
                count = int(real[name](fd, data, *args))
                operation.data = raw[:count]
                self._end(operation)
                return count

            return call

        def sized(name: str) -> Callable[..., None]:
            def call(fd: Any, *args: int) -> None:
                known = self._files.get(fd) if isinstance(fd, int) else None
                real[name](fd, *args)
                if known is not None:
                    size = sum(args) if name == "posix_fallocate" else args[0]
                    self._end(self._add(Operation("size", inode=known[1], offset=size, value=name)))

            return call

        def synced(name: str) -> Callable[[int], None]:
            def call(fd: int) -> None:
                began, known = len(self.operations), self._files.get(fd)
                real[name](fd)
                if known is not None:
                    kind = "syncdir" if known[1] < 0 else "sync"
                    self._add(Operation(kind, known[0], inode=known[1])).began = began

            return call

        def renamed(name: str) -> Callable[..., None]:
            def call(source: Any, target: Any, **kwargs: Any) -> None:
                old, new = self._inside(source), self._inside(target)
                with self._lock:
                    if old is not None and new is not None:
                        self._inodes[new] = inode = self._inodes.pop(old)
                        operation = self._add(Operation("rename", old, new, inode=inode))
                    real[name](source, target, **kwargs)
                    if old is not None:
                        self._end(operation)

            return call

        def named(kind: str, name: str) -> Callable[..., None]:
            def call(path: Any, *args: Any, **kwargs: Any) -> None:
                with self._lock:
                    real[name](path, *args, **kwargs)
                    inside = self._inside(path)
                    if inside is not None:
                        inode = self._inodes.pop(inside, -1) if kind == "unlink" else -1
                        self._end(self._add(Operation(kind, inside, inode=inode)))

            return call

        replacements: dict[str, Any] = {"open": opened, "close": closed}
        replacements |= {name: written(name) for name in ("pwrite", "pwritev", "write")}
        replacements |= {name: sized(name) for name in ("ftruncate", "truncate", "posix_fallocate")}
        replacements |= {name: synced(name) for name in ("fsync", "fdatasync")}
        replacements |= {name: renamed(name) for name in ("replace", "rename")}
        replacements |= {name: named("unlink", name) for name in ("unlink", "remove")}
        replacements |= {name: named(name, name) for name in ("mkdir", "rmdir")}
        with mock.patch.multiple(os, **replacements):
            yield


Tree = dict[str, bytes | None]  # path to a file's bytes, None for a directory


def _tree(root: Path, operations: Sequence[Operation], chosen: Callable[[int], float | bytes]) -> Tree:
    """The directory after those of `operations` that chosen(index) > 0; a write may be chosen by sectors (bytes)."""
    files: dict[int, bytearray] = {}
    names: dict[str, int | None] = {}
    for index, operation in enumerate(operations):
        part = chosen(index)
        if not part:
            continue
        content = files.setdefault(operation.inode, bytearray())
        if operation.kind in ("create", "mkdir"):
            names[operation.path] = operation.inode if operation.kind == "create" else None
        elif operation.kind in ("unlink", "rmdir"):
            names.pop(operation.path, None)
        elif operation.kind == "rename":
            if names.get(operation.path) == operation.inode:
                del names[operation.path]
            names[operation.target] = operation.inode
        elif operation.kind == "size":
            if operation.value != "posix_fallocate" or operation.offset > len(content):
                del content[operation.offset :]
                content.extend(bytes(operation.offset - len(content)))
        elif operation.kind == "write":
            content.extend(bytes(max(0, operation.offset + len(operation.data) - len(content))))
            for at in range(0, len(operation.data), SECTOR) if isinstance(part, bytes) else [0]:
                size = SECTOR if isinstance(part, bytes) else len(operation.data)
                if not isinstance(part, bytes) or part[at // SECTOR % len(part)]:
                    piece = operation.data[at : at + size]
                    content[operation.offset + at : operation.offset + at + len(piece)] = piece
    tree: Tree = {path: None if inode is None else bytes(files[inode]) for path, inode in names.items()}
    # What lies in a directory that is not there cannot be reached.
    known = {str(root), *(path for path, data in tree.items() if data is None)}
    while True:
        reachable = {path: data for path, data in tree.items() if os.path.dirname(path) in known}
        if len(reachable) == len(tree):
            return tree
        tree = reachable
        known = {str(root), *(path for path, data in tree.items() if data is None)}


def final_state(recorder: Recorder) -> Tree:
    """What the directory must hold if every call was recorded."""
    return _tree(recorder.root, recorder.operations, lambda index: 1.0)


def on_disk(root: Path) -> Tree:
    """What a directory holds."""
    return {str(path): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


def _durable(operations: Sequence[Operation], end: int, ignored: Callable[[Operation], bool]) -> set[int]:
    """Of the first `end` operations, those that a sync has made durable by then."""
    found: set[int] = set()
    for sync in operations[:end]:
        if ignored(sync):
            continue
        for index, operation in enumerate(operations[: sync.began]):
            if operation.kind in ("write", "size"):
                covered = sync.kind == "sync" and operation.inode == sync.inode
            elif operation.kind in ("create", "unlink", "rename", "mkdir", "rmdir"):
                directory = os.path.dirname(operation.target or operation.path)
                covered = sync.kind == "syncdir" and directory == sync.path
            else:
                continue
            if covered and operation.ended <= sync.began:
                found.add(index)
    return found


def crash_states(
    recorder: Recorder,
    samples: int,
    rng: random.Random,
    ignored: Callable[[Operation], bool] = lambda sync: False,
    first: int = 0,
) -> Iterator[tuple[int, Tree]]:
    """After each operation: everything so far is on the drive, nothing that was not synced is, and `samples` times a
    random part is (whole operations, in no order; the sectors of a write each for itself). Equal states come once.

    `ignored` leaves out syncs, to prove that each is needed. Yields the number of operations and the directory, from
    `first` operations on.
    """
    seen: set[tuple[Any, bytes]] = set()
    marks: tuple[Any, ...] = ()
    for end in range(len(recorder.operations) + 1):
        if end and recorder.operations[end - 1].kind == "mark":
            marks = (*marks, recorder.operations[end - 1].value)
        if end < first:
            continue
        durable = _durable(recorder.operations, end, ignored)
        operations = recorder.operations[:end]
        choices: list[Callable[[int], float | bytes]] = [lambda index: 1.0, lambda index, d=durable: float(index in d)]
        for _ in range(samples if len(durable) < end else 0):
            share = rng.choice((0.2, 0.5, 0.8))
            picked: list[float | bytes] = []
            for index, operation in enumerate(operations):
                if index in durable:
                    picked.append(1.0)
                elif operation.kind == "write" and rng.random() < 0.5:
                    picked.append(bytes(rng.random() < 0.5 for _ in range(61)))
                else:
                    picked.append(float(rng.random() < share))
            choices.append(picked.__getitem__)
        for choice in choices:
            tree = _tree(recorder.root, operations, choice)
            digest = hashlib.blake2b(digest_size=16)
            for path in sorted(tree):
                digest.update(path.encode() + b"\0" + (tree[path] or b"") + b"\0")
            if (marks, digest.digest()) not in seen:
                seen.add((marks, digest.digest()))
                yield end, tree


def restore(root: Path, tree: Tree) -> None:
    """Make the directory hold exactly `tree`."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            os.mkdir(path)
        else:
            Path(path).write_bytes(data)


# ---- a store under the recorder ----

RECORDED = (
    Extent("a", 3 * PAGE - 5, 2, True),
    Extent("b", PAGE, 2, True),
    Extent("c", 20 * PAGE, 2, True),
    Extent("frozen", 5000, 1, True),
    Extent("scratch", 2 * PAGE, 1, False),
)


def record_store(root: Path, commits: int, seed: int, extents: Sequence[Extent] = RECORDED) -> Recorder:
    """A store on two paths under `root`: made, committed `commits` times with random writes between, reopened half-way
    and destroyed. The marks are ("start", version), ("end", version) around each commit and ("destroy",)."""
    rng, recorder = random.Random(seed), Recorder(root)
    root.mkdir(parents=True)
    updated = [extent for extent in extents if extent.sides == 2]
    with recorder.recording():
        paths = recorded_paths(root)
        store = Store.create(paths, "run", extents, backend="threads")
        values = {extent.key: [0] * extent.blocks for extent in extents if extent.durable}
        write_blocks(store, "frozen", 0, 1, 77, values)
        store.publish("frozen")
        for version in range(1, commits + 1):
            for extent in rng.sample(updated, rng.randint(1, len(updated))):
                for _ in range(rng.randint(1, 2)):
                    write_blocks(store, extent.key, 0, extent.blocks, rng.randrange(1, 1 << 40), values)
                    store.publish(extent.key)
            write_blocks(store, "scratch", 0, 1, 5, {"scratch": [0]})
            unpublished = rng.choice(updated)
            if version > 1:
                before = {unpublished.key: list(values[unpublished.key])}
                write_blocks(store, unpublished.key, 0, unpublished.blocks, 9, {unpublished.key: [0] * 99})
                values |= before
                published = store._contents[unpublished.key]
                if not published.staged.any():  # it was not committed yet, so it went in place
                    values[unpublished.key] = [9 + block for block in range(unpublished.blocks)]
            recorder.mark(("start", version))
            assert store.commit({"values": values}) == version
            recorder.mark(("end", version))
            if version == commits // 2:
                store.close()
                store = Store.open(paths, "run", backend="threads")
        recorder.mark(("destroy",))
        kept = on_disk(root), final_state(recorder)
        store.destroy()
    assert kept[0] == kept[1], "a call went past the recorder"
    assert on_disk(root) == final_state(recorder)
    return recorder


def recorded_paths(root: Path) -> list[StorePath]:
    return [StorePath(root / "one", 1 << 28), StorePath(root / "two", 1 << 28)]


def check_crash(recorder: Recorder, end: int, tree: Tree) -> None:
    """The store in a crash state opens at the version whose commit had returned, or the one under way, whole."""
    started = returned = 0
    gone = False
    for operation in recorder.operations[:end]:
        if operation.kind == "mark":
            what, *version = operation.value
            if what == "start":
                started = version[0]
            elif what == "end":
                returned = version[0]
            else:
                gone = True
    restore(recorder.root, tree)
    paths = recorded_paths(recorder.root)
    if not Store.exists(paths, "run"):
        assert returned == 0 or gone, f"version {returned} is lost"
        Store.create(paths, "run", RECORDED[:1], backend="threads").destroy()
        return
    with Store.open(paths, "run", backend="threads") as store:
        assert returned <= store.version <= started, (store.version, returned, started)
        check_contents(store, store.meta["values"])


def main(arguments: Sequence[str]) -> None:
    """`python crashing.py PATH PATH OPERATIONS SEED`: kill_at_random in a process with no threads of its own."""
    torch.set_num_threads(1)
    paths = [StorePath(Path(path), 1 << 28) for path in arguments[:2]]
    print(kill_at_random(paths, int(arguments[2]), int(arguments[3])))


if __name__ == "__main__":
    main(sys.argv[1:])
