"""Files for aligned transfers that bypass the page cache where the file system allows it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from pathlib import Path

from .buffers import PAGE
from .errors import StoreFull, from_os_error

FLUSH = 128 << 20
"""Bytes that are written through the page cache before they are brought to the device."""


class DirectFile:
    """A file for aligned transfers: O_DIRECT when the file system allows it (`direct` says which), else buffered.

    `fd` is open until close(), then -1; `generation` changes whenever it is another one.
    Creates the file when `create` is given. Raises StoreError when it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        self.direct = False
        self.generation = 0
        self._dirty = 0
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            self.fd = os.open(self.path, flags, 0o644)
            try:
                direct = os.open(self.path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    self.close()
                    raise
            else:
                buffered, self.fd, self.direct = self.fd, direct, True
                os.close(buffered)
                self._check_direct()
        except OSError as error:
            raise from_os_error(error, "cannot open", self.path) from error

    def _check_direct(self) -> None:
        """Fall back to buffered transfers: some file systems take the flag and then refuse every transfer."""
        with mmap.mmap(-1, PAGE) as page:
            try:
                os.preadv(self.fd, [page], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.close()
                self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                self.direct = False

    def reserve(self, nbytes: int) -> None:
        """Allocate the file's first `nbytes` bytes on the device. Raises StoreFull when there is no room."""
        # Through a buffered descriptor: where a file system cannot allocate, libc writes single bytes instead.
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(fd, 0, nbytes)
            finally:
                os.close(fd)
            if self.direct:
                self._check_direct()  # of an empty file, nothing could be read to find out
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise from_os_error(error, f"cannot reserve {nbytes} bytes", self.path) from error
            stat = os.statvfs(self.path.parent)
            raise StoreFull(
                f"cannot reserve space: needed {nbytes} bytes, available {stat.f_bavail * stat.f_frsize}",
                path=self.path,
                errno=errno.ENOSPC,
            ) from error

    def fsync(self) -> None:
        """Make all that was written durable (data and the metadata needed to read it)."""
        os.fdatasync(self.fd)

    def cached(self, nbytes: int) -> None:
        """Count bytes that were written through the page cache; with each `FLUSH` of them, bring all to the device.

        A commit's one sync of gigabytes would otherwise go without progress for longer than a drive may.
        """
        with self._lock:
            self._dirty += nbytes
            if self._dirty < FLUSH:
                return
            self._dirty = 0
        # By a descriptor of its own, and whatever comes of it: the kernel tells an error once by each, and the commit,
        # for which it is final, has to learn of it.
        with contextlib.suppress(OSError):
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self.fd = self.fd, -1
        self.generation += 1
        if fd >= 0:
            os.close(fd)
