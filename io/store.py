"""The durable home of tensors: named extents in pre-allocated files, replaced version by version.

How a version stays whole. Every block of a two-sided durable extent has two places. A write goes to the place that
the last commit does not use, publish() makes the new content what reads see, and commit() makes it what survives: it
syncs the data files and then replaces the manifest, which holds the side and checksum of every block. So whatever
stops the program, and wherever, the last manifest describes bytes that nothing has touched since.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from . import manifest, store_parts
from .backend import Backend
from .content import Content, parts_of, verify_blocks
from .endurance import Wear
from .errors import IOTimeout, StoreError, from_os_error
from .manifest import BLOCK, Extent, Manifest, StorePath
from .manifest_file import ManifestFile
from .request import Batch, Observer, Priority, Request, Transfer
from .store_parts import StoreParts
from .sums import FAILED, PENDING, VALID, BlockCheck, BlockSums, checker, summer

logger = logging.getLogger(__name__)


class Store:
    """Named extents on one or more paths. Made by Store.create or Store.open; all methods may be called from any
    thread. Requests on the same blocks are not ordered among each other: wait for one before submitting the next."""

    def __init__(self, parts: StoreParts) -> None:
        self._directories = parts.directories
        self.paths = parts.paths
        self.name = parts.name
        self.version = parts.version
        """Number of the last commit; 0 when there is none yet."""
        self._contents = parts.contents
        self._data = parts.data
        self._backend = parts.backend
        self._manifest = ManifestFile(parts.directories, parts.data[0], parts.backend)
        self._wear = Wear(parts.written)
        self._meta = parts.meta
        self._failed = ""
        self._committing = False
        self._closed = False
        self._changed = threading.Condition()

    @classmethod
    def create(
        cls,
        paths: Sequence[StorePath],
        name: str,
        extents: Sequence[Extent],
        *,
        backend: str = "auto",
        record: Path | None = None,
        timeout: float = 120.0,
    ) -> Store:
        """A new store `name`, its space reserved on every path. Durable extents read as zeros until written.

        `backend` is "auto" or a name of choose.BACKENDS, `record` a file to keep in what "auto" measured.
        `timeout` is how many seconds a device may make no progress before waiters fail. What a creation that was
        interrupted before its first commit left under this name is replaced.
        Raises StoreFull (needed and available bytes, path) with nothing left behind, StoreLocked when another process
        uses the store, StoreError when a committed store of this name exists.
        """
        return cls(store_parts.create(paths, name, extents, backend, record, timeout))

    @classmethod
    def open(
        cls,
        paths: Sequence[StorePath],
        name: str,
        *,
        backend: str = "auto",
        record: Path | None = None,
        timeout: float = 120.0,
    ) -> Store:
        """The store at its last committed version. Sizes and bandwidths come from the manifest, locations from `paths`,
        whose order must be that of creation, and so does a new rating; scratch extents have undefined contents.

        Raises StoreError when there is no committed version, the manifest is damaged or a data file is missing or too
        short; StoreLocked when another process uses the store.
        """
        return cls(store_parts.open_committed(paths, name, backend, record, timeout))

    @staticmethod
    def exists(paths: Sequence[StorePath], name: str) -> bool:
        """Whether a committed version of the store is there (it may still be damaged: see open and verify)."""
        return store_parts.exists(paths, name)

    @property
    def extents(self) -> Mapping[str, Extent]:
        """All extents by key."""
        return MappingProxyType({key: content.extent for key, content in self._contents.items()})

    @property
    def meta(self) -> dict[str, Any]:
        """What the last commit was given, as it came back from JSON; {} before the first."""
        with self._changed:
            return dict(self._meta)

    @property
    def backend(self) -> Backend:
        """What moves this store's bytes: for transfers of scratch files that share its queue and its observer."""
        return self._backend

    @property
    def directories(self) -> list[Path]:
        """The store's own directory on each path."""
        return [item.path / self.name for item in self.paths]

    @property
    def observer(self) -> Observer | None:
        """Called after every backend request, with the extent's key as label; see backend.Observer."""
        return self._backend.observer

    @observer.setter
    def observer(self, value: Observer | None) -> None:
        self._backend.observer = value

    @property
    def bytes_read(self) -> int:
        """Bytes read from the data files since the store was opened."""
        return self._backend.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes written to the data files since the store was opened."""
        return self._backend.bytes_written

    @property
    def written(self) -> tuple[int, ...]:
        """Bytes written to each path since the store was made, earlier processes included (see endurance)."""
        return self._wear.totals()

    def wear_counter(self, path: int) -> Callable[[Request], None]:
        """A done callback for writes of other files on the drive of this path (by index): `written` has them too."""
        return self._wear.counter(path)

    @property
    def direct(self) -> bool:
        """Whether all data files bypass the page cache (O_DIRECT)."""
        return all(file.direct for file in self._data)

    def padded(self, key: str) -> int:
        """Size of an extent in the store: its bytes rounded up to a page. Reads and writes use this length."""
        return self._content(key).extent.padded

    def read(self, key: str, offset: int, buffer: Tensor, priority: Priority = Priority.COMPUTE) -> Request:
        """Fill `buffer` (page-aligned 1-D uint8) with the current content from byte `offset` of the extent on.

        The range must begin at a multiple of BLOCK and end at one or at padded(key), and must not be written while it
        is read. The request fails with ChecksumError when the bytes are not those that were written; only blocks of a
        scratch extent that this process has not written go unchecked.
        """
        return self._read(key, offset, buffer, priority)[0]

    def read_unchecked(
        self, key: str, offset: int, buffer: Tensor, priority: Priority = Priority.COMPUTE
    ) -> tuple[Request, BlockCheck]:
        """As read, but the bytes are to be checked by the caller, who has them in a core's cache then: pass them to the
        check in order, in pieces of any size, and call its finish() before anything made from them is kept."""
        return self._read(key, offset, buffer, priority, check=False)

    def _read(
        self, key: str, offset: int, buffer: Tensor, priority: Priority, check: bool = True
    ) -> tuple[Request, BlockCheck]:
        content = self._content(key)
        blocks = content.span(offset, buffer.numel())
        with self._changed:
            self._check_open()
            sides = content.current[blocks]
            content.refuse(blocks, sides, "read")
            known = content.state[sides, blocks]
            sums = content.sums[sides, blocks]
        transfers = []
        for part in parts_of(content, blocks, sides):
            span = slice(part.first, part.first + part.blocks)
            file = self._data[part.file]
            first = int(blocks[part.first])
            after = checker(key, file.path, part.offset, first, sums[span], known[span]) if check else None
            chunk = buffer[part.first * BLOCK : (part.first + part.blocks) * BLOCK]
            transfers.append(Transfer("read", file, part.offset, chunk, priority, label=key, after=after))

        def place(index: int) -> tuple[Path, int]:
            at = content.places[sides[index]]
            return self._data[at.files[blocks[index]]].path, int(at.offsets[blocks[index]])

        return self._submit(Batch(transfers, key)), BlockCheck(key, int(blocks[0]), sums, known, place)

    def write(
        self,
        key: str,
        offset: int,
        buffer: Tensor,
        priority: Priority = Priority.WRITE,
        sums: BlockSums | None = None,
    ) -> Request:
        """Write `buffer` (as for read) at byte `offset` of the extent; it must not change until the request is done.
        `sums` are the checksums of its bytes, all of which went through it; without, they are computed here.

        A block whose current content is committed is written to its other side, and reads see it after publish(); one
        that is not is overwritten in place. Blocks that are being committed by another thread are waited for.
        Raises StoreError when a block has a write under way, for a durable extent of one side after its first commit,
        and when the store has failed.
        """
        content = self._content(key)
        blocks = content.span(offset, buffer.numel())
        given = None if sums is None else sums.finish()
        if given is not None and len(given) != len(blocks):
            raise StoreError(f"cannot write extent '{key}': {len(given)} checksums for {len(blocks)} blocks")
        with self._changed:
            self._check_usable()
            self._wait_for_commit(content, blocks)
            target = content.target(blocks)
            found = np.array(given or [0] * len(blocks), np.uint64)
            transfers = []
            for part in parts_of(content, blocks, target):
                chunk = buffer[part.first * BLOCK : (part.first + part.blocks) * BLOCK]
                before = summer(found[part.first : part.first + part.blocks]) if given is None else None
                file = self._data[part.file]
                transfer = Transfer("write", file, part.offset, chunk, priority, label=key, before=before)
                transfer.add_done_callback(self._wear.counter(part.file))
                transfers.append(transfer)
            content.state[target, blocks] = PENDING
            content.staged[blocks] = target != content.current[blocks]

        def settle(error: StoreError | None) -> None:
            with self._changed:
                content.sums[target, blocks] = found
                content.state[target, blocks] = VALID if error is None else FAILED

        return self._submit(Batch(transfers, key, settle))

    def publish(self, key: str) -> None:
        """Make what was written since the last publish() the current content, atomically. Blocks not written keep
        theirs. Raises StoreError, and changes nothing, when a write of the extent is under way or has failed."""
        content = self._content(key)
        with self._changed:
            self._check_open()
            content.publish()

    def commit(self, meta: dict[str, Any]) -> int:
        """Make the current content of all durable extents, and `meta` (JSON), version + 1; return that number.

        Writes must have been waited for; those of blocks that are written but not published do not belong to it.
        Raises StoreError when a block's last write is under way or failed, or when the device fails: the last
        committed version is then intact. If the device failed at a point after which nothing can be said of what it
        holds, the store refuses further writes and commits; reopened, it is at the old version or the new, whole.
        """
        meta = json.loads(json.dumps(meta))
        with self._changed:
            self._check_usable()
            if self._committing:
                raise StoreError(f"store '{self.name}': another thread is committing")
            durable = {key: content for key, content in self._contents.items() if content.extent.durable}
            sides, sums = {}, {}
            for key, content in durable.items():
                blocks = np.arange(content.extent.blocks)
                content.refuse(blocks, content.current, "commit")
                sides[key] = content.current.copy()
                sums[key] = content.sums[content.current, blocks]
            version = self.version + 1
            self._committing = True
        # Until the outcome is known, assume the worst: that this commit may be what a reopened store finds.
        unusable = "it was interrupted"
        try:
            extents = tuple(content.extent for content in self._contents.values())
            new = Manifest(self.name, version, self.paths, extents, sides, sums, meta, self._wear.totals()).encode()
            # A failed sync of data is final: the kernel reports it once and may have dropped the pages.
            for request in [self._backend.sync(file) for file in self._data]:
                request.wait()
            try:
                self._manifest.write(new)
            except IOTimeout:
                raise  # it may still be under way
            except StoreError:
                unusable = ""  # the old manifest stands and the new one is gone: commit() can be called again
                raise
            self._manifest.replace()
            self._manifest.keep_room(len(new))
            self._wear.add(0, len(new))
            with self._changed:
                for key, content in durable.items():
                    content.committed[:] = sides[key]
                self.version, self._meta = version, meta
                unusable = ""
        except StoreError as error:
            unusable = unusable and str(error)
            raise
        finally:
            with self._changed:
                self._failed = unusable
                self._committing = False
                self._changed.notify_all()
        return version

    def verify(self) -> list[str]:
        """Read the committed version and describe every block that cannot be read or fails its checksum.

        Raises StoreError when a commit happens meanwhile.
        """
        version = self.version
        problems = verify_blocks(self._contents.values(), self._data, self._backend) if version else []
        if self.version != version:
            raise StoreError(f"store '{self.name}': version {self.version} was committed during verify(): run it again")
        return problems

    def close(self) -> None:
        """Fail queued requests, let running ones finish, give the lock back. Idempotent, and never hangs: requests
        that a hung device does not finish are failed too. What was not committed is lost."""
        self._shut(self._directories.release)

    def destroy(self) -> None:
        """close(), and delete the store with all its versions. Raises StoreError on a store that was closed before."""
        if self._closed:
            raise StoreError(f"store '{self.name}' is closed: open it to destroy it", path=self._directories.first)
        self._shut(self._directories.remove)

    def _shut(self, leave: Callable[[], None]) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._backend.close():
            for file in self._data:
                file.close()
            try:
                leave()
            except OSError as error:
                raise from_os_error(error, "cannot delete the store", error.filename) from error
        else:
            # Bytes may still arrive: neither the file descriptors nor the lock may be given to anyone else.
            logger.warning("store '%s' in %s: the device hangs; locked until exit", self.name, self._directories.first)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _content(self, key: str) -> Content:
        try:
            return self._contents[key]
        except KeyError:
            raise StoreError(f"store '{self.name}' has no extent '{key}'", path=self._directories.first) from None

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"store '{self.name}' is closed", path=self._directories.first)

    def _check_usable(self) -> None:
        self._check_open()
        if self._failed:
            raise StoreError(
                f"store '{self.name}' stopped at version {self.version} because a commit failed ({self._failed})",
                advice="Close it and open it again: it will be at that version or the next, whole.",
            )

    def _wait_for_commit(self, content: Content, blocks: npt.NDArray[np.intp]) -> None:
        """While a commit runs, both sides of a block that it changes are needed."""
        deadline = time.monotonic() + self._backend.timeout
        while (
            self._committing and content.extent.durable and (content.current[blocks] != content.committed[blocks]).any()
        ):
            left = deadline - time.monotonic()
            if left <= 0:
                raise IOTimeout(
                    f"write of extent '{content.extent.key}': the commit under way does not end",
                    path=self._directories.first / manifest.MANIFEST,
                    offset=0,
                )
            self._changed.wait(left)
            self._check_usable()

    def _submit(self, batch: Batch) -> Request:
        for transfer in batch.children:
            try:
                self._backend.submit(transfer)
            except StoreError as error:  # closed meanwhile; the others may be under way, so the batch must say it
                transfer.finish(error)
        return batch
