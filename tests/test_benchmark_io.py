"""benchmarks.io measures what it says: all contenders move the sample, ratios are those of the rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import io as benchmark


def test_a_short_run_has_every_contender(tmp_path: Path) -> None:
    size = 8 * benchmark.MIB
    found = benchmark.measure(tmp_path, size, [size], pairs=2, directions=["write", "mixed"], peers=False)
    assert list(found["directions"]) == ["write", "mixed"] and not list(tmp_path.iterdir())
    for part in found["directions"].values():
        results = part["results"]
        assert {"threads 8 MiB", "store 8 MiB"} <= set(results)
        assert part["sweeps"]["fio"]["best"].startswith("fio raw")  # a preadv loop stands in
        for item in results.values():
            assert len(item["seconds"]) == 2 and min(item["seconds"]) > 0 and item["gb_per_second"] > 0
        assert 0 < results["threads 8 MiB"]["to_fio"]["low"] <= results["threads 8 MiB"]["to_fio"]["high"]
    assert found["checksum"]["cpu_seconds_per_gb"] > 0
    benchmark.show(found)


def test_ratios_are_paired() -> None:
    drifting = [1.0, 10.0, 2.0, 0.5]
    steady = benchmark.ratios([seconds / 1.2 for seconds in drifting], drifting, bar=1.0)
    assert steady["ratio"] == pytest.approx(1.2) and steady["low"] == pytest.approx(1.2) and steady["met"]
    assert not benchmark.ratios(drifting, [seconds / 1.2 for seconds in drifting], bar=0.95)["met"]
