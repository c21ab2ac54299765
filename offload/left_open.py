"""Engines that a program leaves open are closed when it ends: after its last line, sys.exit or an uncaught exception.

Without this the interpreter either waits for lanes that wait for each other, or goes away under one that computes in
native code, which ends in `terminate called without an active exception` and a core dump.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  (for its order: what is registered first is called last)
import logging
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload.engine import Engine

logger = logging.getLogger(__name__)

_open: dict[int, tuple[Engine, int]] = {}  # by id, with the process that opened it: a forked child has no lanes


def opened(engine: Engine) -> None:
    """Remember `engine`, and keep it alive, until `closed`."""
    _open[id(engine)] = (engine, os.getpid())


def closed(engine: Engine) -> None:
    _open.pop(id(engine), None)


def _close_all() -> None:
    for engine, process in reversed(list(_open.values())):
        if process != os.getpid():
            continue
        path = engine.run.path
        try:
            engine.close()
        except BaseException as error:  # the next one has to be closed too, and the program's own error to be seen
            logger.error("closing %s, which was left open: %s: %s", path, type(error).__name__, error)
        else:
            advice = "call close(), or use the engine in a `with`"
            logger.warning("%s was left open; closed at step %d: %s", path, engine.committed_step, advice)


# The interpreter waits for the threads of executors before it calls what `atexit` holds. This hook comes earlier: the
# executors' own, in CPython since 3.9; there is no public one.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
