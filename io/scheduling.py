"""How threads that move bytes share cores with those that compute."""

from __future__ import annotations

import contextlib
import os
import threading

NICENESS = 5
"""A third of the weight of a thread that computes."""


def yield_to_compute() -> None:
    """Lower the calling thread's priority a little, on Linux, where it is each thread's own.

    A parallel operation on the CPU gives every core an equal part and waits for the last: a core that is taken from it
    for a moment makes all others wait as long, so that a second taken costs a second of the step. Measured on two
    cores with all state on an SSD: compute 2.7 instead of 3.0 s of a step. Lower still (19, or SCHED_IDLE), compute
    takes what it takes alone, and then waits as much longer for what was not moved meanwhile; and other programs would
    stop a run altogether.
    """
    if hasattr(os, "setpriority"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
