"""NUMA nodes: which there are, binding memory to some of them, and asking where pages really lie.

CXL memory shows up as a node with memory and without CPUs. The calls are Linux's mbind(2), get_mempolicy(2) and
move_pages(2), made directly, so that no libnuma is needed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import StoreError

SYSFS = Path("/sys/devices/system/node")
_PAGE = 4096
_BIND, _INTERLEAVE = 2, 3  # MPOL_BIND, MPOL_INTERLEAVE of linux/mempolicy.h
_OF_ADDRESS = 2  # MPOL_F_ADDR
_MASK_BITS = 1024
# mbind, get_mempolicy, move_pages
_CALLS = {"x86_64": (237, 239, 279), "aarch64": (235, 236, 239), "riscv64": (235, 236, 239)}


@dataclass(frozen=True)
class Node:
    """One NUMA node: `cpus` as the system lists them ("" for memory without CPUs), sizes in bytes."""

    node: int
    cpus: str
    memory_bytes: int
    free_bytes: int

    @property
    def memory_only(self) -> bool:
        return not self.cpus and self.memory_bytes > 0

    def describe(self) -> str:
        """For messages: `node 2 (no CPUs, 60.0 of 64.0 GiB free)`."""
        cpus = f"CPUs {self.cpus}" if self.cpus else "no CPUs"
        return f"node {self.node} ({cpus}, {self.free_bytes / 2**30:.1f} of {self.memory_bytes / 2**30:.1f} GiB free)"


def nodes(root: Path = SYSFS) -> list[Node]:
    """The nodes of this machine by number; [] where the system does not say."""
    found = []
    for directory in root.glob("node[0-9]*"):
        try:
            lines = (directory / "meminfo").read_text().splitlines()
            cpus = (directory / "cpulist").read_text().strip()
        except OSError:
            continue
        sizes = {words[2].rstrip(":"): int(words[3]) * 1024 for words in map(str.split, lines) if len(words) > 3}
        found.append(Node(int(directory.name[4:]), cpus, sizes.get("MemTotal", 0), sizes.get("MemFree", 0)))
    return sorted(found, key=lambda node: node.node)


def choose(wanted: Sequence[int] | None, nbytes: int, root: Path = SYSFS) -> tuple[int, ...]:
    """The nodes for `nbytes` of memory: those in `wanted`, or all that have memory and no CPUs.

    Raises StoreError, naming the nodes there are, when a node does not exist, none was found, or they have too little
    free memory (memory bound to a full node ends the process).
    """
    there = {node.node: node for node in nodes(root)}
    listed = "; ".join(node.describe() for node in there.values()) or "none that the system describes"
    chosen = tuple(wanted) if wanted else tuple(n for n, node in there.items() if node.memory_only)
    if not chosen:
        raise StoreError(f"no NUMA node has memory and no CPUs; nodes here: {listed}")
    unknown = [node for node in chosen if node not in there or not there[node].memory_bytes]
    if unknown:
        raise StoreError(f"NUMA node {unknown[0]} does not exist or has no memory; nodes here: {listed}")
    free = sum(there[node].free_bytes for node in chosen)
    if nbytes > free:
        raise StoreError(f"{nbytes} bytes do not fit NUMA node {_list(chosen)}, {free} bytes are free; here: {listed}")
    return chosen


def bind(tensor: Tensor, on: Sequence[int]) -> None:
    """Let the pages of `tensor` (page aligned, not touched yet) come from the nodes `on` only; several take turns.

    Raises StoreError when the system refuses, or does not hold on to it.
    """
    mask = _mask(on)
    mode = _BIND if len(on) == 1 else _INTERLEAVE
    size = -(-tensor.numel() // _PAGE) * _PAGE
    _call(0, f"cannot bind memory to NUMA node {_list(on)}", tensor.data_ptr(), size, mode, mask, _MASK_BITS + 1, 0)
    if policy(tensor) != (mode, tuple(sorted(on))):
        raise StoreError(f"memory that was bound to NUMA node {_list(on)} has policy {policy(tensor)}")


def policy(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Mode (Linux's number) and nodes of the memory policy at the first byte of `tensor`."""
    mode, mask = ctypes.c_int(), (ctypes.c_ulong * (_MASK_BITS // 64))()
    what = "cannot ask for the memory policy"
    _call(1, what, ctypes.byref(mode), mask, _MASK_BITS + 1, ctypes.c_void_p(tensor.data_ptr()), _OF_ADDRESS)
    on = tuple(node for node in range(_MASK_BITS) if mask[node // 64] >> node % 64 & 1)
    return mode.value, on


def placement(tensor: Tensor) -> dict[int, int]:
    """Bytes of `tensor` per node that its pages lie on now; pages that were never touched do not count."""
    count = -(-tensor.numel() // _PAGE)
    found: Counter[int] = Counter()
    for start in range(0, count, 4096):
        size = min(4096, count - start)
        pages = (ctypes.c_void_p * size)(*(tensor.data_ptr() + (start + index) * _PAGE for index in range(size)))
        status = (ctypes.c_int * size)()
        _call(2, "cannot ask where pages lie", 0, ctypes.c_ulong(size), pages, None, status, 0)
        found.update(node for node in status if node >= 0)
    return {node: pages * _PAGE for node, pages in sorted(found.items())}


def _mask(on: Sequence[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = (ctypes.c_ulong * (_MASK_BITS // 64))()
    for node in on:
        mask[node // 64] |= 1 << node % 64
    return mask


def _call(which: int, what: str, *arguments: object) -> None:
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        raise StoreError(f"{what}: its system calls are not known on {platform.machine()}")
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if syscall(ctypes.c_long(numbers[which]), *converted) != 0:
        code = ctypes.get_errno()
        advice = {
            errno.EINVAL: "The node does not exist or is offline.",
            errno.EPERM: "A container's sandbox forbids it: allow mbind, get_mempolicy and move_pages.",
            errno.ENOSYS: "This kernel has no NUMA support.",
        }.get(code, "")
        raise StoreError(f"{what}: {os.strerror(code)}", errno=code, advice=advice)


def _list(on: Sequence[int]) -> str:
    return ", ".join(str(node) for node in on)
