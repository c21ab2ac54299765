"""An Iovec of the package `liburing` that can be used again: one over other memory at each call."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from .errors import StoreError


class _Entry(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


class Vector:
    """An Iovec that is pointed at other memory for each call.

    The package (2026.3.30) never lets go of a buffer that an Iovec was made from: one per call would keep alive all
    memory that was ever read into or written from. So the few that a ring needs are made once, over a byte of their
    own, and the C structure behind them is rewritten. Raises StoreError where it is not found.
    """

    def __init__(self, uring: Any) -> None:
        own = bytearray(1)
        address = ctypes.addressof(ctypes.c_char.from_buffer(own))
        self._iovec = uring.Iovec([own])
        # Behind the object's header: the number of entries, and where they are.
        words = (ctypes.c_size_t * 2).from_address(id(self._iovec) + object.__basicsize__)
        known = sys.getsizeof(self._iovec) >= object.__basicsize__ + ctypes.sizeof(words) and words[0] == 1
        self._entry = _Entry.from_address(words[1]) if known else _Entry()
        if (self._entry.base, self._entry.nbytes) != (address, 1):
            raise StoreError(
                "io_uring cannot be used: this version of the package liburing lays out its Iovec in another way",
                advice="Install liburing 2026.3.30, or set memory.backend to threads.",
            )

    def over(self, address: int, nbytes: int) -> Any:
        """The Iovec, over `nbytes` bytes at `address`; who calls keeps that memory and this object until it is done."""
        self._entry.base, self._entry.nbytes = address, nbytes
        return self._iovec
