"""`offload doctor --store`: stores found, listed, verified and counted, whole and damaged."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from offload.io import BLOCK, Extent, Ledger, Store, StoreError, StorePath, allocate, choose, inspect, used_share
from offload.planner import drives
from typer.testing import CliRunner

from offload import cli, doctor, tables

EXTENTS = [
    Extent("0/param", 2 * BLOCK + 5000, 2, True),
    Extent("1/param", 9000, 2, True),
    Extent("1/grad", 8192, 1, False),
]


def made(tmp_path: Path, name: str = "run") -> list[StorePath]:
    """A store on two paths, written once and committed twice."""
    paths = [StorePath(tmp_path / "a", 1 << 28, tbw=1e-3), StorePath(tmp_path / "b", 1 << 28)]
    with Store.create(paths, name, EXTENTS) as store:
        for extent in EXTENTS:
            with allocate(extent.padded, Ledger()) as buffer:
                buffer.tensor.random_(0, 256, generator=torch.Generator().manual_seed(1))
                store.write(extent.key, 0, buffer.tensor).wait()
            store.publish(extent.key)
        store.commit({"step": 0})
        store.commit({"step": 1})
    return paths


def test_what_a_store_holds(tmp_path: Path) -> None:
    made(tmp_path)
    for place in (tmp_path / "a", tmp_path / "a" / "run", tmp_path / "b", tmp_path / "b" / "run"):
        assert inspect.find(place) == [tmp_path / "a" / "run"]
    assert inspect.find(tmp_path) == []
    found = inspect.examine(tmp_path / "a" / "run")
    assert (found["name"], found["version"], found["state"], found["problems"]) == ("run", 2, "committed", [])
    durable = EXTENTS[0].padded + EXTENTS[1].padded
    assert found["verified"]["bytes"] == durable and found["verified"]["seconds"] > 0
    assert found["roles"]["param"] == {
        "extents": 2, "nbytes": EXTENTS[0].nbytes + 9000, "padded": durable, "on_paths": 2 * durable,
    }  # fmt: skip
    assert [extent["key"] for extent in found["extents"]] == ["0/param", "1/param", "1/grad"]
    used = [path["used"] for path in found["paths"]]
    assert used == [sum(extent["bytes_on_paths"][path] for extent in found["extents"]) for path in (0, 1)]
    assert used == [(tmp_path / f / "run" / f"data-{i}.bin").stat().st_size for i, f in enumerate("ab")]
    json.dumps(found)


def test_a_store_in_use_is_listed_and_one_without_a_commit_is_named(tmp_path: Path) -> None:
    paths = made(tmp_path)
    with Store.open(paths, "run"):
        found = inspect.examine(tmp_path / "a" / "run")
        assert found["state"] == "in use" and str(os.getpid()) in found["note"] and found["extents"]
    Store.create(paths, "other", EXTENTS).close()
    assert inspect.examine(tmp_path / "a" / "other")["state"] == "never committed"
    assert inspect.find(tmp_path / "a") == [tmp_path / "a" / name for name in ("other", "run")]


def test_looking_at_a_store_neither_measures_nor_allocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, or beside a run on the same drive, verifying must not write."""
    with Store.create([StorePath(tmp_path / "a", 1 << 28)], "run", EXTENTS[:1]) as store:
        with allocate(EXTENTS[0].padded, Ledger()) as buffer:
            store.write("0/param", 0, buffer.tensor.fill_(1)).wait()
        store.commit({})
    sparse = tmp_path / "a" / "run" / "data-0.bin"
    content = sparse.read_bytes()
    with open(sparse, "r+b") as copy:  # what was never written becomes a hole
        copy.truncate(0)
        copy.write(content.rstrip(b"\0"))
        copy.truncate(len(content))
    held = sparse.stat().st_blocks
    assert held * 512 < len(content)
    monkeypatch.setattr(choose, "WORTH_MEASURING", 0)
    monkeypatch.setattr(choose, "_measure", lambda *_: pytest.fail("a backend was measured"))
    found = inspect.examine(tmp_path / "a" / "run")
    assert (found["state"], found["problems"]) == ("committed", [])
    assert sparse.stat().st_blocks == held


def test_bytes_written_are_kept_over_resumes_and_compared_with_the_rating(tmp_path: Path) -> None:
    paths = made(tmp_path)
    once = sum(extent.padded for extent in EXTENTS)
    with Store.open(paths, "run") as store:
        before = store.written
        assert once <= sum(before) <= once + 2 * 10_000  # and two manifests
        with allocate(EXTENTS[1].padded, Ledger()) as buffer:
            store.write("1/param", 0, buffer.tensor).wait()
        assert sum(store.written) == sum(before) + EXTENTS[1].padded
        store.commit({})
        total = store.written
    found = inspect.examine(tmp_path / "a" / "run", verify=False)
    assert found["verified"] is None
    written = [path["written"] for path in found["paths"]]
    assert written[1] == total[1] and total[0] - 10_000 <= written[0] <= total[0]
    assert found["paths"][0]["used_share"] == pytest.approx(written[0] / 1e9) and found["paths"][1]["tbw"] is None
    with Store.open([StorePath(paths[0].path, 1, tbw=600), paths[1]], "run") as store:
        assert store.paths[0].tbw == 600  # a new rating replaces the old
        assert used_share(6 * 10**12, store.paths[0]) == pytest.approx(0.01)


@pytest.mark.parametrize("damage", ["bit", "short", "manifest"])
def test_the_command_finds_damage_and_exits_1(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr(doctor, "MEASURED", 16 << 20)
    data, manifest = tmp_path / "a" / "run" / "data-0.bin", tmp_path / "a" / "run" / "manifest.json"
    if damage == "bit":
        with open(data, "r+b") as file:
            file.write(b"\x00\x01\x02")
    else:
        os.truncate(data if damage == "short" else manifest, 4096 if damage == "short" else 20)
    done = CliRunner().invoke(cli.app, ["doctor", "--json", "--store", str(tmp_path / "a")])
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    told = {"bit": "extent '0/param', block 0: the bytes read are not those written", "short": "has 4096 bytes, not",
            "manifest": "manifest is damaged"}  # fmt: skip
    (content,) = found["stores"][0]["contents"]
    assert content["state"] == "damaged" and told[damage] in content["problems"][0]


def test_the_command_lists_a_whole_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr(doctor, "MEASURED", 16 << 20)
    found = doctor.examine([tmp_path / "a" / "run"], verify=True)
    assert found["stores"][0]["path"] == str(tmp_path / "a") and not doctor.damaged(found)
    console = tables.open_console()
    with console.capture() as capture:
        console.print(doctor.render(found))
    text = " ".join(capture.get().split())
    assert "run: committed, version 2" in text and "0 problems" in text and "of the rated 0.001 TB" in text


def test_shares_follow_bandwidth_and_spill_over_when_a_path_is_full(tmp_path: Path) -> None:
    size = 64 << 20
    for speeds, sizes, expected in (
        ((3e9, 1e9), (1 << 30, 1 << 30), (96, 32)),
        ((3e9, 1e9), (40 << 20, 1 << 30), (40, 88)),
        ((3e9, None), (1 << 30, 1 << 30), (64, 64)),
    ):
        paths = [
            StorePath(tmp_path / str(i), n, bandwidth=speed)
            for i, (n, speed) in enumerate(zip(sizes, speeds, strict=True))
        ]
        with Store.create(paths, "run", [Extent("x", size, 2, True)]) as store:
            store.commit({})
            used = [path["used"] >> 20 for path in inspect.examine(tmp_path / "0" / "run", verify=False)["paths"]]
            assert sum(used) == 128 and all(abs(u - e) <= 8 for u, e in zip(used, expected, strict=True)), used
            (extent,) = inspect.examine(tmp_path / "0" / "run", verify=False)["extents"]
            assert extent["bytes_on_paths"] == [n << 20 for n in used]
        with Store.open(paths, "run") as store:  # places are computed again from the manifest
            assert store.verify() == []
            store.destroy()
    with pytest.raises(StoreError):
        Store.open(paths, "run")


def test_the_snippets_of_the_storage_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "storage.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/storage.md", "exec"), names)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"a": (3e9, 1e9), "b": (6e9, 2e9)}, [1.5e9, 3e9]),
        ({"a": (3e9, 1e9), "b": (3.2e9, 1.1e9)}, None),
        ({"a": (3e9, 1e9)}, None),
    ],
)
def test_drives_are_told_apart_when_they_differ(
    rates: dict[str, tuple[float, float]], expected: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drives, "file_systems", lambda paths: {hash(paths[0]): Path(paths[0])})
    monkeypatch.setattr(drives, "drive_rates", lambda path: (*rates[str(path)], 1.0, "measured"))
    found = drives.bandwidths(list(rates))
    assert found == (None if expected is None else pytest.approx(expected))
    monkeypatch.setattr(drives, "drive_rates", lambda path: (1.0, 1.0, 1.0, "assumed: it cannot be written"))
    assert drives.bandwidths(list(rates)) is None
