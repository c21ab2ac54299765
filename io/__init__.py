"""Moving bytes between memory and files: host buffers, asynchronous direct I/O, and a durable store of extents.

    from offload.io import BLOCK, Extent, Ledger, Priority, Store, StorePath, allocate

    ledger = Ledger()
    extents = [Extent("0/param", nbytes=100_000_000, sides=2, durable=True)]
    with Store.create([StorePath(Path("/mnt/nvme0"), size=1 << 30)], "run-1", extents) as store:
        with allocate(store.padded("0/param"), ledger, "cpu", "staging") as buffer:
            store.write("0/param", 0, buffer.tensor).wait()
            store.publish("0/param")
            store.commit({"step": 1})          # version 1: from here on it survives a crash
            store.read("0/param", 0, buffer.tensor, Priority.COMPUTE).wait()   # checksums verified

Knows tensors as bytes; knows nothing of models or training.
"""

from .backend import Backend, ThreadsBackend
from .buffers import PAGE, HostBuffer, Ring, allocate, round_up
from .directfile import DirectFile
from .errors import ChecksumError, IOTimeout, StoreError, StoreFull, StoreLocked
from .faults import FaultyBackend
from .ledger import Ledger
from .manifest import BLOCK, STRIPE, Extent, StorePath
from .request import Observer, Priority, Request
from .store import Store

__all__ = [
    "BLOCK",
    "PAGE",
    "STRIPE",
    "Backend",
    "ChecksumError",
    "DirectFile",
    "Extent",
    "FaultyBackend",
    "HostBuffer",
    "IOTimeout",
    "Ledger",
    "Observer",
    "Priority",
    "Request",
    "Ring",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StorePath",
    "ThreadsBackend",
    "allocate",
    "round_up",
]
