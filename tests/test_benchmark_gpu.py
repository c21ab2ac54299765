"""The GPU benchmark as its command is run, at toy size on the CPU, and its reading of profiles."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import parts, peers, profiled
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.case import Case


def test_two_parts_on_the_cpu(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case of each: the engine against the reference, and its peaks beside the plan."""
    exact, memory = parts.PARTS["exact"], parts.PARTS["memory"]
    monkeypatch.setitem(parts.PARTS, "exact", (lambda s: [*exact[0](s)][1:2], exact[1]))
    monkeypatch.setitem(parts.PARTS, "memory", (lambda s: [next(memory[0](s))], memory[1]))
    command = ["exact", "memory", "--device", "cpu", "--small", "--cap", "1GiB", "--ram", "2GiB"]
    assert main([*command, "--out", str(fast_path / "out"), "--store", str(fast_path)]) == 0
    exact_report = json.loads((fast_path / "out" / "exact.json").read_text())
    assert exact_report["verdict"] == {
        "equal": {"float32, clip, M=3": True}, "compiled_loss_difference": {}, "met": True,
    }  # fmt: skip
    report = json.loads((fast_path / "out" / "memory.json").read_text())
    (case,) = report["cases"].values()
    assert 0 < case["reserved_peak_bytes"]["cpu"] <= case["planned"]["peak_bytes"]["cpu"]
    assert len(case["step_seconds"]) == 2 and case["tokens"] == 2 * 2 * 32
    assert report["skipped"] == {}
    assert (fast_path / "out" / "memory" / "00-ram" / "report.html").exists()
    assert (fast_path / "out" / "memory" / "00-ram" / "trace.json").exists()


def test_a_missing_peer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("deepspeed-nvme", "deepspeed"), ("torchao", "torchao"), ("megatrain", "MegaTrain")):
        with pytest.raises(peers.MissingError, match=f"{package}.* is not installed"):
            peers.SYSTEMS[name](Case("", "toy", 32, "cpu", 1, "t"), tmp_path)


def event(cat: str, name: str, begin: float, end: float, tid: int = 7, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid, "args": args}


def test_reading_a_profile() -> None:
    mib = 1 << 20
    events = [
        event("user_annotation", profiled.STEP, 0, 1000),
        event("user_annotation", f"{profiled.UNIT}: forward of a", 0, 300),
        event("kernel", "gemm", 100, 500),
        event("kernel", "gemm", 400, 700),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 50, 150, bytes=8 * mib),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 600, 800, bytes=8 * mib),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 200, 210, bytes=4096),
        event("cuda_runtime", "cudaStreamSynchronize", 250, 260, tid=1),  # the main thread's, in a unit
        event("cuda_runtime", "cudaEventSynchronize", 250, 260, tid=2),  # a lane's
        event("cuda_runtime", "cudaStreamSynchronize", 900, 910, tid=1),  # between units
    ]
    rate = 8 * mib / 100e-6
    found = profiled.device(events, {2}, {"HtoD": rate, "DtoH": rate})
    assert found["idle_share"] == pytest.approx(0.4)
    copies = found["copies"]["HtoD"]
    assert copies["beside_kernels"] == pytest.approx((50 + 100) / 300)
    assert copies["share_of_link"] == pytest.approx(0.75)
    assert copies["large_pageable"] == 1
    assert found["copies"]["DtoH"]["share_of_link"] is None
    assert found["waits_inside_units"] == {"cudaStreamSynchronize": 1}


def test_bars_of_the_peers() -> None:
    def result(seconds: float, ram: int) -> dict[str, Any]:
        return {"step_seconds": [seconds], "peak_pss_bytes": ram, "parameters": 10, "tokens": 100}

    sizes = parts.Sizes(Case("", "toy", 32, "cpu", 1, "t"), False, "auto")
    found = {"1b, ours": result(1.0, 50), "1b, deepspeed-cpu": result(1.8, 100), "1b, megatrain": result(1.3, 100)}
    bars = {b["bar"]: b["met"] for b in parts.peers_verdict(sizes, found)["bars"]}
    assert bars == {
        "1b: tokens/s of ours over deepspeed-cpu": False,
        "1b: RAM of ours over deepspeed-cpu": True,
        "1b: tokens/s of ours over megatrain": True,
    }
