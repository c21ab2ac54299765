"""The step benchmark as its command is run, at toy size, and its arithmetic."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step import compare, watch, zero
from benchmarks.step.__main__ import main
from benchmarks.step.setting import Setting
from offload import footprint

TOY = ["--size", "toy", "--sequence", "32", "--rounds", "1", "--warm", "1", "--steps", "1", "--micro-batches", "2"]


def test_plain_and_this_engine_side_by_side(
    fast_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = fast_path / "out.json"
    command = [*TOY, "--systems", "a,e", "--work", str(fast_path / "work"), "--json", str(out), "--keep"]
    assert main(command) == 0
    report = json.loads(out.read_text())
    assert report["losses"] == {name: {"equal": True, "largest_difference": 0.0} for name in ("a", "e")}
    assert len(report["systems"]["e"]["losses"][0]) == 2
    engine, plain = report["systems"]["e"], report["systems"]["a"]
    assert "nvme" in engine["placements"]
    assert plain["median_step_seconds"] > 0 and engine["step_over_busiest_lane"] > 0
    # The tree's PSS, not a share of it: more than the interpreter and the libraries, less than this machine.
    assert all(100e6 < system["peak_pss_bytes"] < 4e9 for system in (engine, plain))
    assert json.loads((fast_path / "work" / "runs" / "round1-e" / "run" / "trace.json").read_text())
    assert not (fast_path / "work" / "runs" / "round1-e" / "store").exists()

    began = report["rounds"]["1"]["e"]["began"]
    monkeypatch.setattr(footprint, "measure", lambda kind: report["footprint_bytes"])
    monkeypatch.setattr(watch, "run", None)
    assert main([*command, "--resume-rounds"]) == 0  # nothing is run again
    assert json.loads(out.read_text())["rounds"]["1"]["e"]["began"] == began
    assert "equal" in capsys.readouterr().out


def test_a_lock_that_a_killed_build_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built or measured; PyTorch would wait for it without end."""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"{re.escape(str(lock))} says that .* remove the file"):
        zero.build()
    lock.unlink()
    zero.refuse_locks()


def rounds(**seconds: list[list[float]]) -> compare.Rounds:
    count = len(next(iter(seconds.values())))
    return {i: {name.replace("_", "-"): {"seconds": runs[i]} for name, runs in seconds.items()} for i in range(count)}


def test_ratios_are_of_paired_rounds() -> None:
    drifting = rounds(e=[[1.0, 1.2], [2.0, 2.2], [4.0, 4.4]], c=[[2.2, 2.2], [4.2, 4.2], [8.4, 8.4]])
    ratio = compare.paired(drifting, "e", "c")
    assert ratio is not None
    assert ratio["value"] == 0.5
    low, high = ratio["interval"]
    assert 1.0 / 2.2 <= low <= 0.5 <= high <= 1.2 / 2.2
    assert compare.paired(drifting, "e", "d") is None


def test_bars_depend_on_the_setting() -> None:
    system = {
        "peak_pss_bytes": 10, "read_bytes_per_parameter": 14.0, "written_bytes_per_parameter": 12.2,
        "step_over_busiest_lane": 1.2,
    }  # fmt: skip
    systems = {"a-ckpt": system, "c": system, "e": system}
    measured = rounds(e=[[1.0]], c=[[3.0]], a_ckpt=[[0.8]])
    one = {bar["bar"]: bar["met"] for bar in compare.bars(Setting("271m"), measured, systems)}
    assert one == {
        "step time of (e) over (c)": True,
        "peak memory of (e) over (c)": False,
        "step time of (e) over (a-ckpt)": True,
        "bytes written per parameter and step, (e)": False,
        "bytes read per parameter and step, (e)": True,
    }
    eight = {bar["bar"]: bar["met"] for bar in compare.bars(Setting("271m", micro_batches=8), measured, systems)}
    assert eight == {"step time of (e) over (a-ckpt)": False, "step time over the busiest lane, (e)": False}
    assert compare.bars(Setting("toy"), measured, systems) == []
