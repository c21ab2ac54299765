"""RAM as the kernel counts it: the proportional set size (PSS) of a process tree, now."""

from __future__ import annotations

import os

import psutil


def process_tree(pid: int | None = None) -> list[int]:
    """`pid` (default: this process) and all its descendants."""
    root = pid or os.getpid()
    try:
        return [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [root]


def resident_and_pss(pid: int) -> tuple[int, int]:
    """Bytes of one process, counted in one walk over its pages: all that are resident, and its private ones with its
    share of each shared one. Zeros when the process is gone."""
    found = {"Rss": 0, "Pss": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in found:
                    found[name] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found["Rss"], found["Pss"]


def tree_pss(pid: int | None = None) -> int:
    """Bytes of the process tree of `pid` (default: this process)."""
    return sum(resident_and_pss(member)[1] for member in process_tree(pid))



def beyond_pss() -> int:
    """Resident bytes of this process beyond the PSS of its tree: what others share of its pages, less its children."""
    own, *children = process_tree()
    resident, pss = resident_and_pss(own)
    return resident - pss - sum(resident_and_pss(child)[1] for child in children)
