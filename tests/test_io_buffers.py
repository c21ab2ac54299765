"""Ledger, host buffers and rings."""

from __future__ import annotations

import os
import threading
import time
import warnings

import psutil
import pytest
import torch
from offload.io import PAGE, IOTimeout, Ledger, Ring, StoreError, allocate


def test_ledger_counts_by_tier_and_category_and_keeps_peaks() -> None:
    ledger = Ledger()
    ledger.add("cpu", "staging", 100)
    ledger.add("cpu", "home", 50)
    ledger.remove("cpu", "staging", 100)
    ledger.add("gpu", "weights", 7)
    assert ledger.in_use("cpu") == 50 and ledger.peak("cpu") == 150
    assert ledger.in_use("nvme") == 0 and ledger.peak("nvme") == 0
    assert ledger.snapshot() == {
        "cpu": {"staging": {"bytes": 0, "peak": 100}, "home": {"bytes": 50, "peak": 50}},
        "gpu": {"weights": {"bytes": 7, "peak": 7}},
    }
    ledger.reset_peaks()
    assert ledger.peak("cpu") == 50
    assert ledger.snapshot()["cpu"]["staging"] == {"bytes": 0, "peak": 0}


def test_ledger_refuses_to_go_negative() -> None:
    ledger = Ledger()
    ledger.add("cpu", "a", 10)
    with pytest.raises(ValueError, match="cpu/a, which holds 10"):
        ledger.remove("cpu", "a", 11)
    with pytest.raises(ValueError, match="cpu/b"):
        ledger.remove("cpu", "b", 1)
    with pytest.raises(ValueError, match="use remove"):
        ledger.add("cpu", "a", -1)
    assert ledger.in_use("cpu") == 10


def test_ledger_is_exact_under_threads() -> None:
    ledger = Ledger()

    def work() -> None:
        for _ in range(2000):
            ledger.add("cpu", "x", 3)
            ledger.remove("cpu", "x", 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.in_use("cpu") == 0 and 3 <= ledger.peak("cpu") <= 12


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, 3_000_001])
def test_buffer_is_page_aligned_and_exact(nbytes: int) -> None:
    ledger = Ledger()
    with allocate(nbytes, ledger, "cpu", "test") as buffer:
        assert buffer.nbytes == -(-nbytes // PAGE) * PAGE == buffer.tensor.numel() == ledger.in_use("cpu")
        assert buffer.tensor.dtype == torch.uint8 and buffer.tensor.data_ptr() % PAGE == 0
        assert not buffer.tensor.any()
    assert ledger.in_use("cpu") == 0 and ledger.peak("cpu") == buffer.nbytes


def test_free_is_idempotent_and_size_must_be_positive() -> None:
    ledger = Ledger()
    buffer = allocate(10, ledger)
    buffer.free()
    buffer.free()
    assert ledger.in_use("cpu") == 0
    with pytest.raises(ValueError, match="positive"):
        allocate(0, ledger)


def test_free_returns_memory_even_while_a_view_lives() -> None:
    ledger, process = Ledger(), psutil.Process()
    buffer = allocate(64 << 20, ledger)
    view = buffer.tensor[PAGE:].view(torch.float32)
    view.fill_(1.0)
    before = process.memory_info().rss
    buffer.free()
    assert before - process.memory_info().rss > 60 << 20
    assert view[0] == 0  # still mapped: no crash


def test_a_forked_child_shares_no_buffer() -> None:
    """Else every page that is written while the child lives would be there twice."""
    with allocate(4 << 20, Ledger()) as buffer:
        buffer.tensor.fill_(1)
        array = buffer.tensor.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads: the child only looks
            child = os.fork()
        if child == 0:
            os._exit(3 if array[0] or array[-1] else 7)
        array[:] = 2
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert array[0] == array[-1] == 2


def test_ring_hands_out_distinct_chunks_and_waits() -> None:
    ledger = Ledger()
    ring = Ring(2, 5000, ledger, "cpu", "staging")
    assert ledger.in_use("cpu") == 2 * 2 * PAGE
    first, second = ring.acquire(1), ring.acquire(1)
    assert first.data_ptr() != second.data_ptr() and first.numel() == 2 * PAGE
    begin = time.monotonic()
    with pytest.raises(IOTimeout, match=r"'staging'.*0\.05 s.*all 2 chunks"):
        ring.acquire(0.05)
    assert time.monotonic() - begin < 2
    threading.Timer(0.05, ring.release, [first]).start()
    assert ring.acquire(5).data_ptr() == first.data_ptr()
    ring.close()
    assert ledger.in_use("cpu") == 0


def test_ring_refuses_foreign_and_twice_released_tensors() -> None:
    with allocate(PAGE, Ledger()) as other:
        ring = Ring(1, PAGE, Ledger(), category="staging")
        with pytest.raises(ValueError, match="not a chunk"):
            ring.release(other.tensor)
        chunk = ring.acquire(1)
        ring.release(chunk[:100])  # a view of its beginning stands for the chunk
        with pytest.raises(ValueError, match="released already"):
            ring.release(chunk)
        ring.close()


def test_ring_close_fails_waiters() -> None:
    ring = Ring(1, PAGE, Ledger(), category="staging")
    ring.acquire(1)
    threading.Timer(0.05, ring.close).start()
    with pytest.raises(StoreError, match="closed"):
        ring.acquire(30)
    ring.close()
    with pytest.raises(StoreError, match="closed"):
        ring.acquire(0)
