"""RAM as the kernel counts it: the proportional set size (PSS) of a process tree, now and at its peak."""

from __future__ import annotations

import os
import threading
import time

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


class Sampler:
    """Samples the PSS of a process tree from a thread; `peak` is the largest seen, in bytes.

    Reading the sum makes the kernel walk the page tables, so the pause between samples is at least `interval` seconds
    and at least as long as keeps the sampling below `share` of the time.
    """

    def __init__(self, interval: float = 0.25, share: float = 0.01, pid: int | None = None) -> None:
        self.peak = 0
        self._pid = pid or os.getpid()
        self._interval = interval
        self._share = share
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pss-sampler", daemon=True)

    def _run(self) -> None:
        while True:
            begin = time.perf_counter()
            self.peak = max(self.peak, tree_pss(self._pid))
            if self._stop.wait(max(self._interval, (time.perf_counter() - begin) / self._share)):
                return

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
