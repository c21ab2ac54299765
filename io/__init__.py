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

from .aiofiles_backend import AiofilesBackend
from .backend import Backend
from .buffers import PAGE, HostBuffer, Ring, allocate, lock, round_up
from .choose import BACKENDS, Choice, choose_backend, make_backend, open_backend, why_not
from .directfile import DirectFile
from .endurance import drives, used_share
from .errors import ChecksumError, IOTimeout, StoreError, StoreFull, StoreLocked
from .faults import FaultyBackend
from .ledger import Ledger
from .libaio import LibaioBackend
from .manifest import BLOCK, STRIPE, Extent, StorePath, sync
from .request import Observer, Priority, Request
from .scan import NonFiniteError, Scan, copy_and_scan, first_non_finite
from .scheduling import yield_to_compute
from .store import Store
from .sums import BlockCheck, BlockSums
from .threads import ThreadsBackend
from .tiers import HostTier, Pace, copy, moving
from .uring import UringBackend

__all__ = [
    "BACKENDS",
    "BLOCK",
    "PAGE",
    "STRIPE",
    "AiofilesBackend",
    "Backend",
    "BlockCheck",
    "BlockSums",
    "ChecksumError",
    "Choice",
    "DirectFile",
    "Extent",
    "FaultyBackend",
    "HostBuffer",
    "HostTier",
    "IOTimeout",
    "Ledger",
    "LibaioBackend",
    "NonFiniteError",
    "Observer",
    "Pace",
    "Priority",
    "Request",
    "Ring",
    "Scan",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StorePath",
    "ThreadsBackend",
    "UringBackend",
    "allocate",
    "choose_backend",
    "copy",
    "copy_and_scan",
    "drives",
    "first_non_finite",
    "lock",
    "make_backend",
    "moving",
    "open_backend",
    "round_up",
    "sync",
    "used_share",
    "why_not",
    "yield_to_compute",
]
