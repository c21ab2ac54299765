"""`offload doctor`: what this machine is, which backends work on it, and what would make a run faster, most first."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import offload
from offload import tables
from offload.errors import ConfigError
from offload.io import DirectFile, Ledger, StoreError, ThreadsBackend, allocate
from offload.planner import available_ram

CHUNK = 8 * 2**20  # bytes of one transfer
MEASURED = 128 * 2**20  # bytes written and read at each store path
ADAMW_PARAMETERS = 4_000_000
SLOW_SSD = 2e9  # bytes per second; below this a store on PCIe 4 NVMe would be several times faster


def examine(stores: Sequence[Path]) -> dict[str, Any]:
    """Everything the command shows, as plain data; sizes in bytes, rates per second.

    Each path in `stores` is measured with a temporary file of at most 128 MiB. Raises ConfigError for a path that does
    not exist.
    """
    for path in stores:
        if not path.is_dir():
            raise ConfigError(f"--store {path}: not a directory; give one on the SSD that the store shall use")
    found: dict[str, Any] = {
        "offload": offload.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": _gpus(),
        "cpu": {"cores": psutil.cpu_count(logical=False), "usable_threads": len(os.sched_getaffinity(0))},
        "ram": _ram(),
        "numa": _numa(),
        "stores": [_store(path) for path in stores],
        "optimizers": {"adamw": {"works": True, "parameters_per_second": _adamw_rate()}},
    }
    found["io_backends"] = {
        "threads": {"works": any("error" not in store for store in found["stores"])},
        **{name: {"works": False, "why": "not in this version"} for name in ("io_uring", "libaio", "aiofiles")},
    }
    found["advice"] = _advice(found)
    return found


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bfloat16": torch.cuda.is_bf16_supported(),
            }
        )
    return gpus


def _ram() -> dict[str, int]:
    memory = psutil.virtual_memory()
    # What `memory.cpu: auto` gives a run: control groups obeyed, room left to the system.
    return {"total_bytes": memory.total, "available_bytes": memory.available, "auto_budget_bytes": available_ram()}


def _numa() -> list[dict[str, Any]]:
    nodes = []
    for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        try:
            cpus = (node / "cpulist").read_text().strip()
            total = next(line for line in (node / "meminfo").read_text().splitlines() if "MemTotal:" in line)
        except (OSError, StopIteration):
            continue
        nodes.append(
            {
                "node": int(node.name[4:]),
                "cpus": cpus,
                "memory_bytes": int(total.split()[-2]) * 1024,
                "cxl_like": not cpus,  # memory without CPUs: a CXL card, or another memory-only node
            }
        )
    return nodes


def _store(path: Path) -> dict[str, Any]:
    usage = psutil.disk_usage(str(path))
    found: dict[str, Any] = {
        "path": str(path),
        "filesystem": _filesystem(path),
        "free_bytes": usage.free,
        "total_bytes": usage.total,
    }
    try:
        found.update(_measure(path, min(MEASURED, usage.free // 4 // CHUNK * CHUNK)))
    except (OSError, StoreError) as error:
        found["error"] = str(error)
    return found


def _filesystem(path: Path) -> str:
    mounts = [p for p in psutil.disk_partitions(all=True) if path.absolute().is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "unknown"


def _measure(path: Path, nbytes: int) -> dict[str, Any]:
    """Bandwidth of large transfers through the backend that a run uses, in bytes per second."""
    if nbytes < CHUNK:
        raise OSError(f"{path} has too little free space to measure")
    with tempfile.TemporaryDirectory(dir=path, prefix=".offload-doctor-") as directory:
        file = DirectFile(Path(directory) / "data", create=True)
        backend = ThreadsBackend()
        ledger = Ledger()
        try:
            with allocate(CHUNK, ledger, "cpu", "doctor") as buffer:
                buffer.tensor.random_(0, 256)  # compressing drives must not look faster than they are
                file.reserve(nbytes)
                began = time.perf_counter()
                for request in [backend.write(file, at, buffer.tensor) for at in range(0, nbytes, CHUNK)]:
                    request.wait()
                file.fsync()
                write = nbytes / (time.perf_counter() - began)
                _forget_cached(Path(directory) / "data")
                began = time.perf_counter()
                for request in [backend.read(file, at, buffer.tensor) for at in range(0, nbytes, CHUNK)]:
                    request.wait()
                read = nbytes / (time.perf_counter() - began)
        finally:
            backend.close()
            file.close()
    return {"direct_io": file.direct, "read_bytes_per_second": read, "write_bytes_per_second": write}


def _forget_cached(path: Path) -> None:
    """Without O_DIRECT a read would come from RAM."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _adamw_rate() -> float:
    parameter = torch.zeros(ADAMW_PARAMETERS, requires_grad=True)
    parameter.grad = torch.full_like(parameter, 0.5)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    began = time.perf_counter()
    for _ in range(3):
        optimizer.step()
    return 3 * ADAMW_PARAMETERS / (time.perf_counter() - began)


def _advice(found: dict[str, Any]) -> list[str]:
    """What would help, with the largest effect first."""
    advice = []
    if not found["gpu"]:
        advice.append("No CUDA device: runs work on the CPU, tens to hundreds of times slower than on a GPU.")
    for store in found["stores"]:
        where = store["path"]
        if "error" in store:
            advice.append(f"{where} cannot be used for a store: {store['error']}")
        elif store["filesystem"] in ("tmpfs", "ramfs"):
            advice.append(f"{where} is RAM ({store['filesystem']}), and loses the run at power-off: choose an SSD.")
        elif store["filesystem"].startswith(("nfs", "cifs", "fuse", "9p")):
            advice.append(f"{where} is a network or user-space file system; a local NVMe SSD is faster and safer.")
        else:
            slowest = min(store["read_bytes_per_second"], store["write_bytes_per_second"])
            if slowest < SLOW_SSD:
                advice.append(
                    f"{where} moves {tables.size(slowest)}/s; with state on it, a faster NVMe SSD, or several in "
                    "memory.nvme, shorten the step in proportion."
                )
            if not store["direct_io"]:
                advice.append(f"{where} has no O_DIRECT: transfers pass through the page cache and compete for RAM.")
    if any(node["cxl_like"] for node in found["numa"]):
        advice.append("There is a NUMA node without CPUs (CXL memory); this version does not use it yet.")
    return advice


def render(found: dict[str, Any]) -> RenderableType:
    """`examine`'s answer for a terminal."""
    table = Table(show_header=False, title=f"offload {found['offload']}, torch {found['torch']}", title_justify="left")
    for gpu in found["gpu"]:
        table.add_row("GPU", f"{gpu['name']}, {tables.size(gpu['memory_bytes'])}, capability {gpu['capability']}")
    if not found["gpu"]:
        table.add_row("GPU", "none")
    table.add_row("CPU", f"{found['cpu']['cores']} cores, {found['cpu']['usable_threads']} usable threads")
    ram = found["ram"]
    table.add_row(
        "RAM",
        f"{tables.size(ram['available_bytes'])} available of {tables.size(ram['total_bytes'])}; "
        f"memory.cpu: auto takes {tables.size(ram['auto_budget_bytes'])}",
    )
    for node in found["numa"]:
        what = "no CPUs (CXL)" if node["cxl_like"] else f"CPUs {node['cpus']}"
        table.add_row(f"NUMA node {node['node']}", f"{tables.size(node['memory_bytes'])}, {what}")
    for store in found["stores"]:
        rates = store.get("error") or (
            f"read {tables.size(store['read_bytes_per_second'])}/s, "
            f"write {tables.size(store['write_bytes_per_second'])}/s, "
            f"O_DIRECT {'yes' if store['direct_io'] else 'no'}"
        )
        table.add_row(
            f"store {store['path']}", f"{store['filesystem']}, {tables.size(store['free_bytes'])} free, {rates}"
        )
    for name, backend in found["io_backends"].items():
        table.add_row(f"I/O {name}", "works" if backend["works"] else backend.get("why", "does not work"))
    rate = found["optimizers"]["adamw"]["parameters_per_second"]
    table.add_row("optimizer adamw", f"works, {rate / 1e9:.2f} billion parameters/s on the CPU")
    return Group(table, *(Text(f"{i}. {line}") for i, line in enumerate(found["advice"], start=1)))
