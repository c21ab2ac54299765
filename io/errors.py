"""Errors of this package: each says what happened, to which file and offset, and what to do."""

from __future__ import annotations

import errno as errno_codes
import os

_ADVICE = {
    errno_codes.ENOSPC: "Free space on this file system, or give the store another path.",
    errno_codes.EDQUOT: "The disk quota is used up: raise it, or give the store another path.",
    errno_codes.EIO: "The device reported a failure: check the kernel log and the drive's health before going on.",
    errno_codes.EROFS: "The file system is read-only: remount it writable, or give the store another path.",
    errno_codes.EACCES: "Check the permissions of the path.",
}


class StoreError(Exception):
    """An I/O operation or a call on a store failed.

    The message holds every field that is known: path, offset and length (bytes), errno name, advice.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        length: int | None = None,
        errno: int | None = None,
        advice: str = "",
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self.offset = offset
        self.length = length
        self.errno = errno
        text = message
        if path is not None:
            text += f": file {self.path}"
            if offset is not None:
                text += f", offset {offset}"
            if length is not None:
                text += f", length {length}"
        if errno is not None:
            text += f": {errno_codes.errorcode.get(errno, errno)} ({os.strerror(errno)})"
        advice = advice or (_ADVICE.get(errno, "") if errno is not None else "")
        super().__init__(f"{text}. {advice}" if advice else text)


class StoreFull(StoreError):
    """Not enough space: needed and available bytes and the path are in the message."""


class ChecksumError(StoreError):
    """Bytes that were read differ from those that were written."""


class StoreLocked(StoreError):
    """Another process (or another object of this one) holds the store."""


class IOTimeout(StoreError):
    """A wait ran out of time, for instance because a device hangs."""


def from_os_error(
    error: OSError, message: str, path: str | os.PathLike[str], offset: int | None = None, length: int | None = None
) -> StoreError:
    """The StoreError for `error`; StoreFull when it says that space or quota ran out."""
    kind = StoreFull if error.errno in (errno_codes.ENOSPC, errno_codes.EDQUOT) else StoreError
    result = kind(message, path=path, offset=offset, length=length, errno=error.errno)
    result.__cause__ = error
    return result
