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


def pss(pid: int) -> int:
    """Bytes of one process: its private pages, and of each shared page its share. 0 when the process is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def tree_pss(pid: int | None = None) -> int:
    """Bytes of the process tree of `pid` (default: this process)."""
    return sum(pss(member) for member in process_tree(pid))

