"""One case in a process of its own, with the device memory capped; writes what it measured as JSON lines to a file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Case


def main(job_file: str) -> None:
    """Do one job: {case, directory, events}."""
    job = json.loads(Path(job_file).read_text())
    case, directory = Case.read(Path(job_file)), Path(job["directory"])
    with open(job["events"], "a", buffering=1, encoding="utf-8") as events:

        def tell(event: str, **values: Any) -> None:
            events.write(json.dumps({"event": event, **values}) + "\n")

        tell("capped", **cap(case))
        tell("found", result=_run(case, directory, tell))
        tell("done")
    os._exit(0)  # nothing of a benchmark is worth the time of freeing it


def _run(case: Case, directory: Path, tell: Callable[..., None]) -> dict[str, Any]:
    if case.task == "rates":
        return rates(case)
    if case.system != "ours":
        from benchmarks.gpu import peers

        return peers.train(case, directory, tell)
    if case.task == "exact":
        from benchmarks.gpu import exact

        return exact.run(case, directory)
    from benchmarks.gpu import ours

    return ours.longest(case, directory) if case.task == "longest" else ours.train(case, directory, tell)


def cap(case: Case) -> dict[str, Any]:
    """Bound what this process may take of the device: {device, total_bytes, cap_bytes, fraction}."""
    if case.device != "cuda":
        return {"device": "cpu", "cap_bytes": case.cap}
    properties = torch.cuda.get_device_properties(0)
    fraction = min(1.0, case.cap / properties.total_memory)
    torch.cuda.set_per_process_memory_fraction(fraction)
    return {
        "device": properties.name, "total_bytes": properties.total_memory, "cap_bytes": case.cap, "fraction": fraction,
        "driver": torch.version.cuda,
    }  # fmt: skip


def rates(case: Case) -> dict[str, Any]:
    """Matrix products of random bfloat16 numbers per second, and the link both ways."""
    cuda = case.device == "cuda"
    size = 8192 if cuda else 512
    a = torch.randn(size, size, dtype=torch.bfloat16, device=case.device)
    found = []
    for _ in range(3 + 10):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(a, a)
        if cuda:
            torch.cuda.synchronize()
        found.append(2 * size**3 / (time.perf_counter() - begin))
    from offload.planner import probe

    from offload import rates

    hardware = probe(case.device, refresh=True, adamw_device=rates.adamw_on_device if cuda else None)
    return {
        "matrix_flops": sorted(found[3:])[5], "matrix_flops_all": found[3:], "h2d": hardware.h2d, "d2h": hardware.d2h,
        "link_duplex": hardware.link_duplex, "adamw_device": hardware.adamw_device,
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
