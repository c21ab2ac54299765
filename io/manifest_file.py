"""Replacing the manifest through the backend, whose timeout watches it: first beside the old one, then in its place."""

from __future__ import annotations

import contextlib
import logging

from . import files, manifest
from .backend import Backend
from .buffers import round_up
from .directfile import DirectFile
from .errors import StoreError, StoreFull
from .request import Request

logger = logging.getLogger(__name__)


class ManifestFile:
    """The manifest of one store. `data` is a data file on the same path: its queue is the one that is used."""

    def __init__(self, directories: files.Directories, data: DirectFile, backend: Backend) -> None:
        self._directories = directories
        self._data = data
        self._backend = backend

    def write(self, encoded: bytes) -> None:
        """The new manifest beside the old one, durable; on a full disk in the space that was kept for it."""
        path = self._directories.first / manifest.TEMPORARY

        def write() -> Request:
            return self._backend.sync(self._data, lambda: manifest.write_temporary(path.parent, encoded), path)

        try:
            write().wait()
        except StoreFull:
            if not self._directories.give_room():
                raise
            logger.warning("%s: the disk is full; the manifest takes the space that was kept for it", path.parent)
            write().wait()

    def replace(self) -> None:
        """The new manifest takes the old one's name, durably."""
        path = self._directories.first / manifest.MANIFEST
        self._backend.sync(self._data, lambda: manifest.put_in_place(path.parent), path).wait()

    def keep_room(self, nbytes: int) -> None:
        """Space for the next one, in what the old one of about `nbytes` freed."""
        for room in (manifest_room(nbytes), nbytes * 5 // 4):
            with contextlib.suppress(StoreError):
                self._directories.keep_room(room)
                break


def manifest_room(nbytes: int) -> int:
    """Space to keep for manifests like one of `nbytes`: with room to grow, in steps, so that it is seldom changed."""
    return round_up(nbytes + (128 << 10), 64 << 10)
