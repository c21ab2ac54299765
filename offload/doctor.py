"""`offload doctor`: what this machine is, which backends work on it, and what would make a run faster, most first."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
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
from offload import adamw_jit, rates, run_place, rundir, tables
from offload.device import optimizer_threads
from offload.errors import ConfigError
from offload.io import (
    BACKENDS,
    DirectFile,
    HostTier,
    Ledger,
    StoreError,
    ThreadsBackend,
    allocate,
    inspect,
    numa,
    tiers,
    why_not,
)
from offload.planner import available_ram

CHUNK = 8 * 2**20  # bytes of one transfer
MEASURED = 128 * 2**20  # bytes written and read at each store path
SLOW_SSD = 2e9  # bytes per second; below this a store on PCIe 4 NVMe would be several times faster
LITTLE_RAM = 256 * 2**20  # staging, update buffers and the program itself
JIT_GAIN = 3.0  # of the split-state AdamW, in benchmarks/results (optimizer)


def examine(stores: Sequence[Path], verify: bool = False) -> dict[str, Any]:
    """Everything the command shows, as plain data; sizes in bytes, rates per second.

    Each path in `stores` is measured with a temporary file of at most 128 MiB, and the stores in it are listed and,
    with `verify`, read as a whole. A path may be a store's own directory or a run directory too. Raises ConfigError for
    one that does not exist.
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
        "stores": [_store(path, verify) for path in stores],
        "optimizers": _optimizers(),
    }
    usable = [Path(store["path"]) for store in found["stores"] if "error" not in store]
    found["io_backends"] = {name: _backend(name, usable) for name in BACKENDS}
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
    return [_node(node) for node in numa.nodes()]


def _node(node: numa.Node) -> dict[str, Any]:
    """A node without CPUs is a CXL card, or other memory of its own: what it moves is measured."""
    found: dict[str, Any] = {
        "node": node.node, "cpus": node.cpus, "memory_bytes": node.memory_bytes, "free_bytes": node.free_bytes,
        "cxl_like": node.memory_only,
    }  # fmt: skip
    if node.memory_only:
        try:
            read, write = tiers.measure(HostTier("cxl", nodes=numa.choose([node.node], MEASURED)))
            found |= {"read_bytes_per_second": read, "write_bytes_per_second": write}
        except StoreError as error:
            found["error"] = str(error)
    return found


def damaged(found: dict[str, Any]) -> bool:
    """Whether a store that was verified has blocks or files that are not as they were written."""
    return any(content["state"] == "damaged" for store in found["stores"] for content in store["contents"])


def _store(path: Path, verify: bool) -> dict[str, Any]:
    directories = [first for place in _places(path) for first in inspect.find(place)]
    if path in directories:
        path = path.parent  # of a store's own directory, the drive is measured beside it
    usage = psutil.disk_usage(str(path))
    found: dict[str, Any] = {
        "path": str(path),
        "filesystem": _filesystem(path),
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "contents": [inspect.examine(directory, verify) for directory in directories],
    }
    try:
        found.update(_measure(path, min(MEASURED, usage.free // 4 // CHUNK * CHUNK)))
    except (OSError, StoreError) as error:
        found["error"] = str(error)
    return found


def _places(path: Path) -> list[Path]:
    """Where to look for stores: of a run directory, only its own."""
    path = path.absolute()
    if not run_place.is_run(path):
        return [path]
    info = rundir.read_info(path)
    return [Path(rundir.stored_paths(path, info)[0].path) / info["store"]["name"]]


def _backend(name: str, stores: Sequence[Path]) -> dict[str, Any]:
    """Whether an I/O backend works on all usable store paths, and why not; each is tried with a page."""
    reasons = [why_not(name, path) for path in stores] or ["no usable store path to try it on"]
    reason = next((reason for reason in reasons if reason), "")
    return {"works": False, "why": reason} if reason else {"works": True}


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


def _optimizers() -> dict[str, dict[str, Any]]:
    """The run's own AdamW by compute dtype, measured as the planner does, and whether its compiled kernels work."""
    threads = optimizer_threads("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, dict[str, Any]] = {
        "adamw": {"works": True, "parameters_per_second": rates.adamw("float32", threads)},
        "adamw_bfloat16": {"works": True, "parameters_per_second": rates.adamw("bfloat16", threads)},
    }
    loaded = adamw_jit.load()
    found["compiled_kernels"] = {"works": loaded.jit is not None}
    if loaded.jit is None:
        found["compiled_kernels"]["why"] = loaded.reasons["all"]
    return found


def _advice(found: dict[str, Any]) -> list[str]:
    """What would help, with the largest effect first: what keeps a run from working, then by how much time it saves."""
    advice: list[tuple[float, str]] = []  # (times as fast, or infinity where nothing works without it; what to do)
    if not found["gpu"]:
        advice.append((100.0, "No CUDA device: runs work on the CPU, tens to hundreds of times slower than on a GPU."))
    for store in found["stores"]:
        advice += _store_advice(store)
    if found["ram"]["auto_budget_bytes"] < LITTLE_RAM:
        advice.append(
            (
                float("inf"),
                f"memory.cpu: auto would be {tables.size(found['ram']['auto_budget_bytes'])}; a run needs about "
                f"{tables.size(LITTLE_RAM)} before the first unit's gradient. End other programs or raise the control "
                "group's limit.",
            )
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if found["gpu"] and locked != resource.RLIM_INFINITY and locked < found["ram"]["auto_budget_bytes"]:
        advice.append(
            (
                float("inf"),
                f"The limit of locked memory is {tables.size(locked)}, and memory.cpu is page-locked for the GPU: "
                "raise it (ulimit -l unlimited, or memlock in /etc/security/limits.conf).",
            )
        )
    if importlib.util.find_spec("numba") is None:
        advice.append(
            (
                JIT_GAIN,
                f"numba is not installed: the optimizer of bfloat16 runs is about {JIT_GAIN:g} times faster with it "
                "(python -m pip install numba).",
            )
        )
    if any(node["cxl_like"] for node in found["numa"]):
        advice.append((1.0, "There is a NUMA node without CPUs (CXL memory): memory.cxl gives it to a run."))
    return [text for _, text in sorted(advice, key=lambda item: -item[0])]


def _store_advice(store: dict[str, Any]) -> list[tuple[float, str]]:
    where = store["path"]
    if "error" in store:
        return [(float("inf"), f"{where} cannot be used for a store: {store['error']}")]
    if store["filesystem"] in ("tmpfs", "ramfs"):
        return [(float("inf"), f"{where} is RAM ({store['filesystem']}) and lost at power-off; choose an SSD.")]
    advice = []
    slowest = min(store["read_bytes_per_second"], store["write_bytes_per_second"])
    gain = SLOW_SSD / slowest
    if gain > 1:
        kind = (
            "a network or user-space file system; a local NVMe SSD is faster and safer"
            if store["filesystem"].startswith(("nfs", "cifs", "fuse", "9p"))
            else "slow; a faster NVMe SSD, or several in memory.nvme, shorten the step in proportion"
        )
        advice.append((gain, f"{where} moves {tables.size(slowest)}/s, which is {kind} ({gain:.1f}x with 2 GB/s)."))
    if not store["direct_io"]:
        advice.append((1.2, f"{where} has no O_DIRECT: transfers pass through the page cache and compete for RAM."))
    if store["free_bytes"] < 0.1 * store["total_bytes"]:
        full = 1 - store["free_bytes"] / store["total_bytes"]
        advice.append((1.1, f"{where} is {full:.0%} full: SSDs write slower then."))
    return advice


def render(found: dict[str, Any]) -> RenderableType:
    """`examine`'s answer for a terminal."""
    table = Table(show_header=False, title=f"offload {found['offload']}, torch {found['torch']}", title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
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
        if "read_bytes_per_second" in node:
            read, write = (tables.size(node[f"{way}_bytes_per_second"]) for way in ("read", "write"))
            what += f", one thread reads {read}/s, writes {write}/s"
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
    for name, optimizer in found["optimizers"].items():
        told = "works" if optimizer["works"] else optimizer["why"]
        if rate := optimizer.get("parameters_per_second"):
            told += f", {rate / 1e9:.2f} billion parameters/s on the CPU"
        table.add_row(f"optimizer {name.replace('_', ' ')}", told)
    contents = [_contents(content) for store in found["stores"] for content in store["contents"]]
    return Group(table, *contents, *(Text(f"{i}. {line}") for i, line in enumerate(found["advice"], start=1)))


def _contents(store: dict[str, Any]) -> RenderableType:
    """One store: what it holds by role, on which paths, and what verifying it found."""
    title = f"store {store['directory']}: {store['state']}, version {store['version']}"
    table = Table("role", title=title, title_justify="left")
    for column in ("extents", "bytes", "on the drives"):
        table.add_column(column, justify="right")
    for role, sizes in store["roles"].items():
        table.add_row(role, str(sizes["extents"]), tables.size(sizes["nbytes"]), tables.size(sizes["on_paths"]))
    lines = []
    for path in store["paths"]:
        room = f"{tables.size(path['used'])} reserved of {tables.size(path['size'])}"
        lines.append(f"{path['path']}: {room}, {tables.wear(path)}")
    if "note" in store:
        lines.append(f"not verified: {store['note']}")
    if store["state"] == "never committed":
        lines.append("nothing was committed: starting the run again replaces it, deleting it frees its space")
    if (verified := store["verified"]) is not None:
        nbytes, seconds = verified["bytes"], max(verified["seconds"], 1e-9)
        lines.append(
            f"verified {tables.size(nbytes)} in {tables.duration(seconds)}, {tables.size(nbytes / seconds)}/s, "
            f"{verified['cpu_seconds'] / max(nbytes, 1) * 1e9:.3f} CPU s per GB: {len(store['problems'])} problems"
        )
    lines += [f"problem: {problem}" for problem in store["problems"]]
    return Group(table, *map(Text, lines))
