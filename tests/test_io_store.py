"""The store: contents against a model, durability under SIGKILL, space, locks, striping, damage."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offload.io import (
    BLOCK,
    PAGE,
    STRIPE,
    BlockSums,
    ChecksumError,
    Extent,
    HostBuffer,
    Ledger,
    Store,
    StoreError,
    StoreFull,
    StoreLocked,
    StorePath,
    allocate,
    store_parts,
)
from offload.io.manifest import place

GIB = 1 << 30


def pattern(seed: int, nbytes: int) -> torch.Tensor:
    """Bytes that differ between seeds everywhere; zeros for seed 0, as an extent that was never written."""
    words = torch.arange(nbytes // 8, dtype=torch.int64)
    return ((words * 2654435761 + seed * 40503) * bool(seed)).view(torch.uint8)


def filled(seed: int, nbytes: int) -> HostBuffer:
    buffer = allocate(nbytes, Ledger())
    buffer.tensor.copy_(pattern(seed, nbytes))
    return buffer


def put(store: Store, key: str, seed: int, publish: bool = True) -> None:
    with filled(seed, store.padded(key)) as buffer:
        store.write(key, 0, buffer.tensor).wait(20)
    if publish:
        store.publish(key)


def holds(store: Store, key: str, seed: int) -> bool:
    with allocate(store.padded(key), Ledger()) as buffer:
        buffer.tensor.fill_(0xEE)
        store.read(key, 0, buffer.tensor).wait(20)
        return torch.equal(buffer.tensor, pattern(seed, store.padded(key)))


def one_path(tmp_path: Path, size: int = GIB) -> list[StorePath]:
    return [StorePath(tmp_path, size)]


PARAM = Extent("0/param", 2 * BLOCK + 5000, 2, True)
FROZEN = Extent("0/frozen", BLOCK, 1, True)
GRAD = Extent("0/grad", BLOCK + 1, 1, False)


def test_updates_appear_by_publish_and_survive_by_commit(tmp_path: Path) -> None:
    paths = one_path(tmp_path)
    store = Store.create(paths, "run", [PARAM, FROZEN, GRAD])
    assert store.padded("0/param") == 2 * BLOCK + 2 * PAGE and store.extents["0/grad"] == GRAD
    assert store.version == 0 and store.meta == {} and not Store.exists(paths, "run")
    assert holds(store, "0/param", 0)
    put(store, "0/param", 1, publish=False)  # before the first commit: in place, seen at once
    put(store, "0/frozen", 2)
    assert holds(store, "0/param", 1)
    assert store.commit({"step": 0, "nested": {"a": [1, 2.5, None]}}) == 1
    assert store.version == 1 and Store.exists(paths, "run")

    put(store, "0/param", 3, publish=False)
    assert holds(store, "0/param", 1)
    store.publish("0/param")
    assert holds(store, "0/param", 3)
    put(store, "0/param", 4)  # again before a commit: in place
    put(store, "0/grad", 5)
    assert holds(store, "0/param", 4) and holds(store, "0/grad", 5)
    store.close()
    store.close()

    with Store.open(paths, "run") as store:
        assert store.version == 1 and store.meta == {"step": 0, "nested": {"a": [1, 2.5, None]}}
        assert holds(store, "0/param", 1) and holds(store, "0/frozen", 2)
        put(store, "0/param", 6)
        assert store.commit({"step": 1}) == 2
        assert store.verify() == []
    with Store.open(paths, "run") as store:
        assert (store.version, store.meta) == (2, {"step": 1})
        assert holds(store, "0/param", 6) and holds(store, "0/frozen", 2)
        written = store.bytes_written
        put(store, "0/param", 7)
        assert store.bytes_written - written == store.padded("0/param")
        store.destroy()
    assert list(tmp_path.iterdir()) == []


@dataclass
class Model:
    """Per block: what reads see, what is written but not published, and what the last commit holds."""

    now: list[int]
    staged: dict[int, int]
    changed: set[int]
    committed: list[int]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 5), st.integers(0, 3), st.integers(1, 4)),
        st.tuples(st.just("publish"), st.integers(0, 5), st.just(0), st.just(0)),
        st.tuples(st.sampled_from(["commit", "reopen"]), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=16,
)
SIZES = st.lists(
    st.tuples(st.integers(1, 3 * BLOCK), st.sampled_from(["two", "one", "scratch"])), min_size=1, max_size=3
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=SIZES, operations=OPERATIONS, budgets=st.sampled_from([(1,), (3, 1)]))
def test_random_operations_match_a_model(
    sizes: list[tuple[int, str]], operations: Sequence[tuple[str, int, int, int]], budgets: tuple[int, ...]
) -> None:
    extents = [
        Extent(f"{index}", nbytes, 2 if kind == "two" else 1, kind != "scratch")
        for index, (nbytes, kind) in enumerate(sizes)
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [StorePath(Path(folder) / str(index), share * GIB // 8) for index, share in enumerate(budgets)]
        store = Store.create(paths, "run", extents, timeout=20)
        models = {e.key: Model([0] * e.blocks, {}, set(range(e.blocks)), [0] * e.blocks) for e in extents}
        for seed, (operation, which, first, count) in enumerate(operations, 1):
            extent = extents[which % len(extents)]
            model = models[extent.key]
            if operation == "write":
                first %= extent.blocks
                last = min(extent.blocks, first + count)
                blocks = range(first, last)
                with filled(seed, min(last * BLOCK, extent.padded) - first * BLOCK) as buffer:
                    if extent.durable and extent.sides == 1 and store.version:
                        with pytest.raises(StoreError, match="one side"):
                            store.write(extent.key, first * BLOCK, buffer.tensor)
                        continue
                    store.write(extent.key, first * BLOCK, buffer.tensor).wait()
                for block in blocks:
                    value = seed * 1000 + block - first
                    if block in model.changed:
                        model.now[block] = value
                    else:
                        model.staged[block] = value
            elif operation == "publish":
                store.publish(extent.key)
                for block, value in model.staged.items():
                    model.now[block] = value
                    model.changed.add(block)
                model.staged.clear()
            elif operation == "commit":
                assert store.commit({"seed": seed}) == store.version
                for extent in extents:
                    if extent.durable:
                        models[extent.key].committed = list(models[extent.key].now)
                        models[extent.key].changed.clear()
            elif store.version:
                version, meta = store.version, store.meta
                store.close()
                store = Store.open(paths, "run", timeout=20)
                assert (store.version, store.meta) == (version, meta)
                for extent in extents:
                    known = models[extent.key].committed if extent.durable else [-1] * extent.blocks
                    models[extent.key].now = list(known)
                    models[extent.key].staged.clear()
                    if extent.durable:
                        models[extent.key].changed.clear()
            else:
                continue  # nothing was committed: there is nothing to reopen
            for checked in [extent] if operation in ("write", "publish") else extents:
                check_blocks(store, checked, models[checked.key].now)
        assert store.verify() == []
        store.destroy()


def check_blocks(store: Store, extent: Extent, values: list[int]) -> None:
    with allocate(extent.padded, Ledger()) as buffer:
        store.read(extent.key, 0, buffer.tensor).wait()
        for block, value in enumerate(values):
            if value >= 0:
                part = buffer.tensor[block * BLOCK : (block + 1) * BLOCK]
                seed, within = divmod(value, 1000)
                expected = pattern(seed, within * BLOCK + len(part))[within * BLOCK :]
                assert torch.equal(part, expected), (extent.key, block, value)


KILLED = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from offload.io import *
torch.set_num_threads(1)
paths = [StorePath(Path(item), 1 << 28) for item in sys.argv[1:3]]
extents = [Extent("a", 3 * BLOCK + 100, 2, True), Extent("b", BLOCK, 2, True), Extent("c", 9000, 2, True),
           Extent("frozen", 5000, 1, True), Extent("scratch", BLOCK, 1, False)]
durable = [extent for extent in extents if extent.sides == 2]

def fill(tensor, value):
    tensor.view(torch.int64).copy_(torch.arange(tensor.numel() // 8) * 7919 + value if value else torch.zeros(1))

def child(seed, out):
    # The faults of OFFLOAD_FAULTS kill this process.
    rng = random.Random(seed)
    store = Store.open(paths, "run") if Store.exists(paths, "run") else Store.create(paths, "run", extents)
    values = store.meta.get("values") or {extent.key: [0] * extent.blocks for extent in durable}
    buffer = allocate(4 * BLOCK, Ledger()).tensor
    while True:
        for extent in rng.sample(durable, rng.randint(1, 3)):
            first = rng.randrange(extent.blocks)
            last = rng.randint(first + 1, extent.blocks)
            value = rng.randrange(1, 1 << 40)
            part = buffer[:min(last * BLOCK, extent.padded) - first * BLOCK]
            for block in range(first, last):
                fill(part[(block - first) * BLOCK:(block - first + 1) * BLOCK], value + block)
                values[extent.key][block] = value + block
            store.write(extent.key, first * BLOCK, part).wait()
            store.publish(extent.key)
        store.write("scratch", 0, buffer[:BLOCK]).wait()
        if rng.random() < 0.6:
            version = store.commit({"values": values})
            os.write(out, f"{version}\\n".encode())

rounds, version = json.loads(sys.argv[3]), 0
for seed, faults in enumerate(rounds):
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.environ["OFFLOAD_FAULTS"] = faults
        child(seed, into)
    os.close(into)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    reported = [int(line) for line in os.read(out, 1 << 20).split()]
    os.close(out)
    if not Store.exists(paths, "run"):
        assert version == 0 and not reported
        continue
    store = Store.open(paths, "run")
    last = max([version, *reported])
    assert store.version in (last, last + 1), (store.version, last)
    assert store.verify() == []
    for extent in durable:
        with allocate(extent.padded, Ledger()) as got, allocate(BLOCK, Ledger()) as expected:
            store.read(extent.key, 0, got.tensor).wait()
            for block, value in enumerate(store.meta["values"][extent.key]):
                part = got.tensor[block * BLOCK:(block + 1) * BLOCK]
                fill(expected.tensor[:len(part)], value)
                assert torch.equal(part, expected.tensor[:len(part)]), (extent.key, block)
    version = store.version
    store.close()
print(version)
"""


def run_killed(tmp_path: Path, rounds: list[str]) -> int:
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "one"), str(tmp_path / "two"), json.dumps(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_killed_at_every_stage_of_a_commit_it_reopens_at_a_committed_version(tmp_path: Path) -> None:
    """Two data files: a commit syncs them (0, 1), writes the new manifest (2), puts it in place (3)."""
    rounds = [f"sync:kill:after={stage}" for stage in (0, 3, 4, 5, 6, 7, 8)]
    assert run_killed(tmp_path, [*rounds, "write:kill:after=9"]) > 3


def test_publish_and_commit_refuse_unfinished_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_FAULTS", "write:delay=0.3")
    with Store.create(one_path(tmp_path), "run", [FROZEN]) as store, filled(1, BLOCK) as buffer:
        request = store.write("0/frozen", 0, buffer.tensor)
        for call in (
            lambda: store.publish("0/frozen"),
            lambda: store.commit({}),
            lambda: store.write("0/frozen", 0, buffer.tensor),
            lambda: store.read("0/frozen", 0, buffer.tensor),
        ):
            with pytest.raises(StoreError, match="'0/frozen', block 0: it is still being written"):
                call()
        request.wait()
        assert store.commit({}) == 1


def test_a_write_waits_for_the_commit_that_needs_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_FAULTS", "sync:delay=0.15")
    store = Store.create(one_path(tmp_path), "run", [PARAM])
    put(store, "0/param", 1)
    store.commit({})
    put(store, "0/param", 2)  # published and not committed: both sides are needed until the commit ends
    thread = threading.Thread(target=store.commit, args=({"two": 2},))
    thread.start()
    while not store._committing:
        time.sleep(0.001)
    put(store, "0/param", 3)
    assert store.version == 2 and holds(store, "0/param", 3)
    thread.join()
    store.close()
    with Store.open(one_path(tmp_path), "run") as store:
        assert store.version == 2 and holds(store, "0/param", 2)


def test_requests_must_cover_whole_blocks(tmp_path: Path) -> None:
    with Store.create(one_path(tmp_path), "run", [PARAM]) as store, allocate(3 * BLOCK, Ledger()) as buffer:
        for offset, nbytes in ((PAGE, BLOCK), (0, PAGE), (BLOCK, BLOCK - PAGE), (2 * BLOCK, BLOCK), (3 * BLOCK, PAGE)):
            with pytest.raises(StoreError, match=r"'0/param': a request must begin at a multiple"):
                store.read("0/param", offset, buffer.tensor[:nbytes])
        with pytest.raises(StoreError, match="address"):
            store.write("0/param", 0, buffer.tensor[8 : BLOCK + 8])
        with pytest.raises(StoreError, match="no extent 'x'"):
            store.read("x", 0, buffer.tensor)
        store.publish("0/param")  # nothing of the refused write is left
        store.close()
        with pytest.raises(StoreError, match="closed"):
            store.read("0/param", 0, buffer.tensor[:BLOCK])


def test_striping_follows_the_sizes_of_the_paths() -> None:
    extents = [Extent(str(index), 100 * (1 << 20) + 12345, 2, True) for index in range(4)]
    sizes = [900 << 20, 300 << 20]
    placed, used = place(extents, sizes)
    total = sum(extent.padded * 2 for extent in extents)
    assert sum(used) == total and abs(used[0] - 0.75 * total) <= 2 * STRIPE
    taken: list[tuple[int, int, int]] = []
    for extent in extents:
        for side in placed[extent.key]:
            share = (side.files == 0).mean()
            assert 0.6 < share < 0.9  # of every long run, not only of the whole
            for block in range(extent.blocks):
                size = min(BLOCK, extent.padded - block * BLOCK)
                taken.append((int(side.files[block]), int(side.offsets[block]), size))
    taken.sort()
    for before, after in itertools.pairwise(taken):
        assert before[0] != after[0] or before[1] + before[2] == after[1]  # no overlap, no hole
    assert all(offset + size <= sizes[file] for file, offset, size in taken)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40 << 20), st.integers(1, 2)), min_size=1, max_size=8),
    st.lists(st.integers(PAGE, 200 << 20), min_size=1, max_size=4),
)
def test_placement_never_overlaps_and_uses_paths_to_the_last_block(
    extents: list[tuple[int, int]], sizes: list[int]
) -> None:
    described = [Extent(str(index), nbytes, sides, True) for index, (nbytes, sides) in enumerate(extents)]
    needed = sum(extent.padded * extent.sides for extent in described)
    try:
        placed, used = place(described, sizes)
    except StoreFull:
        assert needed > sum(sizes) - len(sizes) * BLOCK
        return
    assert sum(used) == needed and all(part <= size for part, size in zip(used, sizes, strict=True))
    taken: set[tuple[int, int]] = set()
    for extent in described:
        for side in placed[extent.key]:
            taken.update(zip(side.files.tolist(), side.offsets.tolist(), strict=True))
    assert len(taken) == sum(extent.blocks * extent.sides for extent in described)


def test_two_paths_of_unequal_size_hold_one_store(tmp_path: Path) -> None:
    paths = [StorePath(tmp_path / "large", 96 << 20), StorePath(tmp_path / "deep" / "small", 32 << 20)]
    store = Store.create(paths, "run", [Extent("x", 50 << 20, 2, True)])
    put(store, "x", 1)
    store.commit({})
    put(store, "x", 2)
    store.commit({})
    store.close()
    size = {item.path.name: (item.path / "run" / f"data-{i}.bin").stat().st_size for i, item in enumerate(paths)}
    assert sum(size.values()) == 100 << 20 and 70 << 20 <= size["large"] <= 80 << 20
    with Store.open(paths, "run") as store:
        assert holds(store, "x", 2)
    with pytest.raises(StoreError, match="no committed store"):
        Store.open(paths[::-1], "run")
    with pytest.raises(StoreError, match="created as 'run' on 2 paths"):
        Store.open(paths[:1], "run")
    with pytest.raises(StoreError, match=r"belongs to a committed store.*large/run/manifest.json"):
        Store.create(paths[1:], "run", [FROZEN])
    moved = [StorePath(tmp_path / "moved", 1), paths[1]]
    os.rename(paths[0].path, moved[0].path)
    with Store.open(moved, "run") as store:
        assert holds(store, "x", 2)
        store.destroy()
    assert not (paths[1].path / "run").exists()


@pytest.mark.parametrize("where", [0, 1, -1])
def test_a_flipped_bit_is_found_on_read_and_by_verify(tmp_path: Path, where: int) -> None:
    paths = one_path(tmp_path)
    with Store.create(paths, "run", [PARAM, FROZEN]) as store:
        put(store, "0/param", 1)
        store.commit({})
    data = tmp_path / "run" / "data-0.bin"
    offset = {0: 17, 1: BLOCK + 99, -1: 2 * BLOCK + PAGE}[where]  # side 0 of the first extent begins the file
    with open(data, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    block = offset // BLOCK
    with Store.open(paths, "run") as store:
        with pytest.raises(ChecksumError, match=rf"'0/param', block {block}:.*data-0.bin, offset {block * BLOCK}"):
            holds(store, "0/param", 1)
        problems = store.verify()
        assert len(problems) == 1 and f"'0/param', block {block}" in problems[0]
        put(store, "0/param", 2)
        store.commit({})
        assert store.verify() == []


def test_a_flipped_bit_in_any_block_of_any_extent_is_found_on_read(tmp_path: Path) -> None:
    rng = random.Random(1)
    with Store.create(one_path(tmp_path), "run", [PARAM, FROZEN, GRAD]) as store:
        for extent in (PARAM, FROZEN, GRAD):
            put(store, extent.key, 1)
        store.commit({})
        put(store, "0/param", 2)  # on its other side
        for extent in (PARAM, FROZEN, GRAD):
            content = store._contents[extent.key]
            for block in range(extent.blocks):
                place = content.places[content.current[block]]
                size = min(BLOCK, extent.padded - block * BLOCK)
                flip(tmp_path / "run" / "data-0.bin", int(place.offsets[block]) + rng.randrange(size), rng.randrange(8))
                said = rf"'{extent.key}', block {block}: the bytes read are not those written: .*offset "
                said += f"{place.offsets[block]}, length {size}"
                with pytest.raises(ChecksumError, match=said):
                    holds(store, extent.key, 1)
                with pytest.raises(ChecksumError, match=said):
                    holds_by_pieces(store, extent.key, 1, rng)
                if extent is not FROZEN:
                    put(store, extent.key, 2)
        with pytest.raises(ChecksumError):
            holds(store, "0/frozen", 1)


def holds_by_pieces(store: Store, key: str, seed: int, rng: random.Random) -> bool:
    """`holds` by a read whose bytes are checked as they pass, in pieces of any size."""
    with allocate(store.padded(key), Ledger()) as buffer:
        request, check = store.read_unchecked(key, 0, buffer.tensor)
        request.wait(20)
        pass_by(check, buffer, rng)
        check.finish()
        return torch.equal(buffer.tensor, pattern(seed, store.padded(key)))


def pass_by(sums: BlockSums, buffer: HostBuffer, rng: random.Random) -> None:
    at, view = 0, buffer.tensor.numpy().data
    while at < len(view):
        count = rng.choice([1, 7, PAGE, 1 << 20, BLOCK, 2 * BLOCK])
        sums.update(view[at : at + count])
        at += count


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sums_of_passing_bytes_are_those_of_the_store(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    nbytes = rng.randrange(1, 3 * BLOCK)
    with Store.create(one_path(tmp_path), "run", [Extent("x", nbytes, 2, True)]) as store:
        with filled(seed % 99 + 1, store.padded("x")) as buffer:
            sums = BlockSums()
            pass_by(sums, buffer, rng)
            store.write("x", 0, buffer.tensor, sums=sums).wait(20)
        store.publish("x")
        store.commit({})
        assert store.verify() == []
        assert holds(store, "x", seed % 99 + 1) and holds_by_pieces(store, "x", seed % 99 + 1, rng)
        store.destroy()


def test_sums_of_other_bytes_are_refused_or_found(tmp_path: Path) -> None:
    with (
        Store.create(one_path(tmp_path), "run", [PARAM]) as store,
        filled(1, store.padded("0/param")) as buffer,
        filled(2, store.padded("0/param")) as other,
    ):
        view, sums = buffer.tensor.numpy().data, BlockSums()
        sums.update(view[:BLOCK])
        with pytest.raises(StoreError, match="1 checksums for 3 blocks"):
            store.write("0/param", 0, buffer.tensor, sums=sums)
        sums.update(view[BLOCK:])
        store.write("0/param", 0, other.tensor, sums=sums).wait(20)
        store.publish("0/param")
        with pytest.raises(ChecksumError, match=r"block \d"):
            holds(store, "0/param", 2)
        put(store, "0/param", 1)
        request, check = store.read_unchecked("0/param", 0, buffer.tensor)
        request.wait(20)
        check.update(view[: 2 * BLOCK])
        with pytest.raises(StoreError, match="2 of 3 blocks"):
            check.finish()


def flip(path: Path, offset: int, bit: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)
        os.fsync(file.fileno())


def test_a_damaged_or_missing_manifest_or_data_file_is_an_error(tmp_path: Path) -> None:
    paths = one_path(tmp_path)
    with Store.create(paths, "run", [FROZEN]) as store:
        store.commit({})
    path = tmp_path / "run" / "manifest.json"
    good = path.read_bytes()
    for bad in (good[:-1], good[:40], b"", good.replace(b'"version":1', b'"version":2'), b"{}\n{}\n"):
        path.write_bytes(bad)
        with pytest.raises(StoreError, match=r"manifest is damaged.*manifest.json"):
            Store.open(paths, "run")
    path.write_bytes(good.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(StoreError, match="format 9"):
        Store.open(paths, "run")
    path.write_bytes(good)
    os.truncate(tmp_path / "run" / "data-0.bin", PAGE)
    with pytest.raises(StoreError, match=rf"has {PAGE} bytes, not {BLOCK}"):
        Store.open(paths, "run")
    path.unlink()
    with pytest.raises(StoreError, match="no committed store"):
        Store.open(paths, "run")
    with pytest.raises(StoreError, match="no committed store"):
        Store.open(paths, "other")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run"]


def test_too_little_budget_or_space_names_the_numbers_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreFull, match=rf"needed {4 * BLOCK} bytes, available {3 * BLOCK} bytes"):
        Store.create(one_path(tmp_path / "new", 3 * BLOCK), "run", [Extent("x", 2 * BLOCK, 2, True)])
    stat = os.statvfs(tmp_path)
    huge = (stat.f_bavail * stat.f_frsize // BLOCK + 1000) * BLOCK
    with pytest.raises(StoreFull, match=rf"needed {huge} bytes, available \d+ bytes: file {tmp_path}/new/run"):
        Store.create(one_path(tmp_path / "new", huge), "run", [Extent("x", huge, 1, True)])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_reservation_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    code = f"""
import resource
from pathlib import Path
from offload.io import *
resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, BLOCK))
paths = [StorePath(Path({str(tmp_path)!r}) / name, 1 << 30) for name in ("new/deep", "there")]
try:
    Store.create(paths, "run", [Extent("x", 4 * BLOCK, 2, True)])
except StoreError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"cannot reserve {4 * BLOCK} bytes" in out and "EFBIG" in out
    assert [item for item in tmp_path.rglob("*")] == [tmp_path / "there"]


def test_a_copy_with_holes_is_reserved_again(tmp_path: Path) -> None:
    """What was never written reads as a hole and a copy leaves it out: its space is taken when it is opened."""
    paths = one_path(tmp_path)
    with Store.create(paths, "run", [PARAM, GRAD]) as store:
        put(store, "0/param", 1)
        store.commit({})
    data = tmp_path / "run" / "data-0.bin"
    size, content = data.stat().st_size, data.read_bytes()
    end = len(content.rstrip(b"\0"))
    data.unlink()
    with open(data, "wb") as copy:
        copy.write(content[:end])
        copy.truncate(size)
    assert data.stat().st_blocks * 512 < size
    with Store.open(paths, "run") as store:
        assert data.stat().st_blocks * 512 >= size
        assert holds(store, "0/param", 1)


def test_a_backend_that_cannot_be_made_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = one_path(tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise StoreError("too little locked memory for a ring")

    with monkeypatch.context() as patched:
        patched.setattr(store_parts, "open_backend", refused)
        with pytest.raises(StoreError, match="for a ring"):
            Store.create(paths, "run", [PARAM])
        assert list(tmp_path.iterdir()) == []
    with Store.create(paths, "run", [PARAM]) as store:
        store.commit({})
    with monkeypatch.context() as patched:
        patched.setattr(store_parts, "open_backend", refused)
        with pytest.raises(StoreError, match="for a ring"):
            Store.open(paths, "run")
    Store.open(paths, "run").close()


def test_stores_of_different_names_share_a_path(tmp_path: Path) -> None:
    paths = one_path(tmp_path)
    one, two = (Store.create(paths, name, [PARAM]) for name in ("one", "two"))
    put(one, "0/param", 1)
    put(two, "0/param", 2)
    one.commit({})
    two.commit({})
    put(one, "0/param", 3)
    assert holds(two, "0/param", 2)
    two.destroy()
    one.commit({})
    assert one.verify() == [] and holds(one, "0/param", 3)
    with pytest.raises(StoreError, match="closed"):
        two.commit({})
    one.close()
    with pytest.raises(StoreError, match="belongs to a committed store"):
        Store.create(paths, "one", [PARAM])
    for name in ("", "..", "a/b"):
        with pytest.raises(StoreError, match="plain file name"):
            Store.create(paths, name, [PARAM])


def test_a_store_in_use_is_locked_and_names_the_process(tmp_path: Path) -> None:
    paths = one_path(tmp_path)
    Store.create(paths, "run", [FROZEN]).close()  # interrupted before its first commit
    code = f"""
import sys
from pathlib import Path
from offload.io import *
store = Store.create([StorePath(Path({str(tmp_path)!r}), 1 << 30)], "run", [Extent("x", 5, 2, True)])
store.commit({{}})
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        for call in (lambda: Store.open(paths, "run"), lambda: Store.create(paths, "run", [FROZEN])):
            with pytest.raises(StoreLocked, match=rf"process {holder.pid}: file {tmp_path}/run"):
                call()
        holder.kill()
    with Store.open(paths, "run") as store:
        assert store.version == 1
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
            Store.open(paths, "run")


def test_an_interrupted_creation_is_replaced(tmp_path: Path) -> None:
    paths = one_path(tmp_path)
    store = Store.create(paths, "run", [PARAM])
    put(store, "0/param", 1)
    store.close()
    assert not Store.exists(paths, "run")
    with Store.create(paths, "run", [PARAM]) as store:
        assert holds(store, "0/param", 0)


def test_commits_go_on_when_others_have_filled_the_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        with Store.create(one_path(tmp_path), "run", [Extent("x", 50_000, 2, True)]) as store:
            with pytest.raises(OSError, match="No space left"):
                (tmp_path / "others").write_bytes(bytes(1 << 20))
            for seed in (1, 2, 3):
                put(store, "x", seed)
                store.commit({"seed": seed, "notes": "n" * 20_000})
                with contextlib.suppress(OSError), open(tmp_path / "others", "ab") as file:
                    file.write(bytes(1 << 20))  # they take what they can get
        with Store.open(one_path(tmp_path), "run") as store:
            assert store.meta["seed"] == 3 and holds(store, "x", 3)
            store.destroy()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_memory_file_systems_work_too() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        paths = one_path(Path(folder))
        with Store.create(paths, "run", [PARAM]) as store:
            put(store, "0/param", 1)
            store.commit({})
        with Store.open(paths, "run") as store:
            assert holds(store, "0/param", 1) and store.verify() == []


def test_the_observer_sees_labelled_transfers(tmp_path: Path) -> None:
    seen: list[tuple[str, int, str]] = []
    with Store.create(one_path(tmp_path), "run", [FROZEN]) as store:
        store.observer = lambda kind, begin, end, nbytes, label: seen.append((kind, nbytes, label))
        put(store, "0/frozen", 1)
        assert holds(store, "0/frozen", 1)
        store.commit({})
    transfers = [("write", BLOCK, "0/frozen"), ("read", BLOCK, "0/frozen")]
    assert seen == [*transfers, *[("write", 0, "sync")] * 3]


def test_extents_and_paths_are_checked(tmp_path: Path) -> None:
    for bad in ((0, 1, True), (5, 3, True), (5, 2, False)):
        with pytest.raises(StoreError, match="extent 'x'"):
            Extent("x", *bad)
    with pytest.raises(StoreError, match="each key once"):
        Store.create(one_path(tmp_path), "run", [FROZEN, FROZEN])
    with pytest.raises(StoreError, match="each path once"):
        Store.create(one_path(tmp_path) * 2, "run", [FROZEN])
    with pytest.raises(StoreError, match="unknown I/O backend 'magic'"):
        Store.create(one_path(tmp_path), "run", [FROZEN], backend="magic")
    assert list(tmp_path.iterdir()) == []
