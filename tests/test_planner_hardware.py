"""Presets load, corrupted ones are refused by key, and the probe measures this machine within cgroup limits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from offload.planner import available_ram, load_hardware, measure, preset_names, probe
from offload.planner.hardware import PRESETS
from offload.planner.measure import SYSTEM_BYTES, cache_directory

NAMES = ["a100-80g", "gh200", "h100", "h200", "laptop-8g", "rtx3090", "rtx4090", "rtx5090"]


def test_every_preset_loads_and_says_where_its_numbers_are_from() -> None:
    assert preset_names() == NAMES
    for name in NAMES:
        hardware = load_hardware(name)
        assert hardware.name == name
        assert {"gpu_bytes", "cpu_bytes", "matrix_flops", "nvme_read", "h2d"} <= set(hardware.source)
        assert hardware.matrix_flops["bfloat16"] > hardware.matrix_flops["float32"]


def test_adamw_on_the_device_is_a_key_that_may_be_left_out(tmp_path: Path) -> None:
    for name in NAMES:
        hardware = load_hardware(name)
        assert 1e9 < hardware.adamw_device < 1e11 and "not measured" in hardware.source["adamw_device"]
    data = yaml.safe_load((PRESETS / "rtx4090.yaml").read_text())
    del data["adamw_device"], data["source"]["adamw_device"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    assert load_hardware(tmp_path / "mine.yaml").adamw_device == 0.0
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data | {"adamw_device": 0}))
    assert load_hardware(tmp_path / "mine.yaml").adamw_device == 0


def test_drives_add_up() -> None:
    assert load_hardware("rtx4090", ssds=3).nvme_read == 3 * load_hardware("rtx4090").nvme_read


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    data = yaml.safe_load((PRESETS / "rtx4090.yaml").read_text())
    data["name"], data["nvme_read"] = "mine", 1.2e10
    (tmp_path / "mine.json").write_text(json.dumps(data))
    assert load_hardware(tmp_path / "mine.json").nvme_read == 1.2e10


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    text = (PRESETS / "rtx4090.yaml").read_text()
    assert "nvme_read: 6.5e+9" in text and "bfloat16: 1.57e+14" in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("nvme_read: 6.5e+9", "nvme_read: 7e9").replace("1.57e+14", "2e14"))
    found = load_hardware(path)
    assert found.nvme_read == 7e9 and found.matrix_flops["bfloat16"] == 2e14


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'rtx4900'.*did you mean 'rtx4090'"):
        load_hardware("rtx4900")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h2d": 0}, "h2d is 0"),
        ({"nvme_write": "fast"}, "nvme_write is 'fast'"),
        ({"ram": float("nan")}, "ram is nan"),
        ({"d2h": True}, "d2h is True"),
        ({"gpu_bytes": 2.5}, "gpu_bytes is 2.5"),
        ({"matrix_flops": {"bfloat16": 1e12}}, "matrix_flops"),
        ({"matrix_flops": {"bfloat16": 1e12, "float32": -1}}, "matrix_flops.float32 is -1"),
        ({"nvme_raed": 1e9}, "unknown key 'nvme_raed'; did you mean 'nvme_read'"),
        ({"cpu_bytes": None}, "cpu_bytes is None"),
        ({"nvme_read": float("inf")}, "nvme_read is inf"),
        ({"nvme_read": 10**400}, "nvme_read is 1000"),
        ({"name": 4090}, "name is 4090"),
        ({"source": ["a white paper"]}, "source is"),
        ({"link_duplex": 3}, "link_duplex is 3"),
        ({"adamw_device": -1}, "adamw_device is -1; accepted: parameters per second from 0"),
        ({"adamw_device": float("inf")}, "adamw_device is inf"),
        ({"adamw_device": "fast"}, "adamw_device is 'fast'"),
        ({"adamw_device": True}, "adamw_device is True"),
    ],
)
def test_a_corrupted_preset_is_refused_by_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    data = yaml.safe_load((PRESETS / "rtx4090.yaml").read_text()) | change
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=message):
        load_hardware(path)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "a: [1", "\x00", "name: x\n"])
def test_a_file_that_is_no_preset_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_hardware(path)


def test_the_probe_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    begin = time.perf_counter()
    first = probe("cpu", [tmp_path / "store" / "not" / "yet"])
    measured = time.perf_counter() - begin
    assert measured < 15  # two seconds on an idle machine
    assert first.gpu_bytes == 0 and 0 < first.cpu_bytes < psutil.virtual_memory().total
    assert 1e9 < first.matrix_flops["float32"] < 1e14 and 1e8 < first.ram < 1e12
    assert 1e7 < first.adamw_parameters_per_second < 1e11
    assert f"nvme {tmp_path}" in first.source and first.nvme_read > 1e6 and first.nvme_write > 1e6
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]  # the test file is gone

    begin = time.perf_counter()
    second = probe("cpu", [tmp_path / "store"])
    assert time.perf_counter() - begin < 0.5
    assert second.nvme_read == first.nvme_read and second.matrix_flops == first.matrix_flops

    (cached,) = cache_directory().glob("hardware-*.json")
    cached.write_text("{}")
    monkeypatch.setattr("offload.planner.measure._measure", lambda *_: first)
    assert probe("cpu", [tmp_path]) == first  # a damaged cache is measured again
    assert "matrix_flops" in cached.read_text()


def test_adamw_is_measured_where_compute_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rate comes back from the cache; a cached machine without it is one on which it is not offered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (("_matrix_rate", 1e12), ("_copy_rate", 1e10), ("_link_rates", (2e10, 2e10, 2.0))):
        monkeypatch.setattr(measure, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 8 << 30))
    asked: list[str] = []

    def rate() -> float:
        asked.append("device")
        return 4e9

    def measured(device: str, refresh: bool = False, on_device: Callable[[], float] | None = rate) -> float:
        return probe(device, [], refresh, lambda _: 1e9, on_device).adamw_device

    assert measured("cpu") == 4e9 and asked == ["device"]
    assert measured("cuda") == 4e9 and asked == 2 * ["device"]
    assert measured("cuda") == 4e9 and asked == 2 * ["device"]
    assert measured("cuda", refresh=True, on_device=lambda: 0.0) == 0.0  # other bits than the CPU's
    assert measured("cuda", refresh=True, on_device=None) == 0.0
    (cached,) = (path for path in cache_directory().glob("hardware-*.json") if "a GPU" in path.read_text())
    data = json.loads(cached.read_text())
    del data["adamw_device"]
    cached.write_text(json.dumps(data))
    assert measured("cuda") == 0.0


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="no CUDA device"):
        probe("cuda")


@pytest.mark.parametrize("version", [1, 2])
def test_ram_is_what_the_cgroup_leaves(tmp_path: Path, version: int) -> None:
    limit, used, cache = 6 << 30, 2 << 30, 1 << 30
    membership = tmp_path / "cgroup"
    root = tmp_path / "fs"
    group = root / "jobs" / "mine" if version == 2 else root / "memory" / "jobs" / "mine"
    group.mkdir(parents=True)
    if version == 2:
        membership.write_text("0::/jobs/mine\n")
        (group / "memory.max").write_text("max\n")
        (group / "memory.current").write_text("0\n")
        files, key = ("memory.max", "memory.current"), "inactive_file"
    else:
        membership.write_text("7:cpu:/\n4:memory:/jobs/mine\n0::/\n")
        (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        (group / "memory.usage_in_bytes").write_text("0\n")
        files, key = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
    # the limit is on the parent: the strictest group counts
    for name, value in zip(files, (limit, used), strict=True):
        (group.parent / name).write_text(f"{value}\n")
    (group.parent / "memory.stat").write_text(f"anon 1\n{key} {cache}\n")
    found = available_ram(root, membership)
    assert found <= limit - (used - cache) - SYSTEM_BYTES
    if psutil.virtual_memory().available > limit:
        assert found == limit - (used - cache) - SYSTEM_BYTES


def test_ram_without_cgroups(tmp_path: Path) -> None:
    assert 0 <= available_ram(tmp_path, tmp_path / "missing") < psutil.virtual_memory().total
