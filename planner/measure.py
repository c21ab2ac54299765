"""Measure this machine in a few seconds, once: matrix products, copies, the optimizer, the drives, far memory.

What is used in two directions at once (the link to the device, the drives) is measured alone and together.

Rates are cached per machine and store path; how much RAM is free is looked up every time.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from offload.planner.drives import SLOW_DRIVE, drive_rates, file_systems
from offload.planner.plan import SPLIT_RATIO, Hardware
from torch import Tensor

SYSTEM_SHARE = 0.10  # of RAM, left to the system ...
SYSTEM_BYTES = 2 << 30  # ... and at least this much
_VERSION = 5  # of what is measured and how; part of the cache key
_LINK_BYTES = 256 << 20  # copied to and from the device
_COPY_BYTES = 64 << 20  # copied within RAM: more than a cache holds, and no more than the smallest runs reserve
_SECONDS = 0.15  # per measurement


def probe(
    device: str,
    store_paths: Sequence[str | Path] = (),
    refresh: bool = False,
    adamw: Callable[[str], float] | None = None,
    adamw_device: Callable[[], float] | None = None,
) -> Hardware:
    """This machine's `Hardware`, measured now or, unless `refresh`, taken from the cache.

    `device` is "cpu" or "cuda". A store path that does not exist is measured at its nearest existing parent; paths on
    one file system count once. A path that cannot be written counts at a slow drive's rates, and `source` says so.
    `adamw` measures the run's own optimizer: parameters per second by compute dtype, at the number of threads its lane
    has; without it torch's fused AdamW is timed. `adamw_device` measures it where compute runs, 0 where the bits there
    are not those of the CPU; without it units that live on the device are not offered.
    Raises ValueError for "cuda" without a CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("memory.device is 'cuda', but there is no CUDA device here; use 'cpu' or 'auto'")
    drives = file_systems(store_paths)
    cache = cache_directory() / f"hardware-{machine_key(device, drives)}.json"
    if not refresh:
        cached = _load(cache)
        if cached is not None:
            return replace(cached, cpu_bytes=available_ram())
    measured = _measure(device, drives, adamw, adamw_device)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, suffix=".tmp", delete=False) as file:
            json.dump(asdict(measured), file)
        os.replace(file.name, cache)
    except OSError:
        pass  # a home that cannot be written costs the next run two seconds, nothing else
    return measured


def cache_directory() -> Path:
    """Where measurements are kept: `offload` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"


def available_ram(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of RAM that a run may take: free or reclaimable, within cgroup limits, less some room for the system."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_limits(cgroups, membership):
        if limit < memory.total:
            total, free = min(total, limit), min(free, limit - used)
    return max(0, free - max(SYSTEM_BYTES, int(SYSTEM_SHARE * total)))


def _cgroup_limits(cgroups: Path, membership: Path) -> list[tuple[int, int]]:
    """(limit, unreclaimable use) of every memory cgroup, v1 or v2, from this process's up to the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        relative = Path(path.lstrip("/"))
        # inside a container the group's own path is often not mounted; its files are then at the root
        for group in {root / relative, *(root / parent for parent in relative.parents), root}:
            limit, used = _number(group / names[0]), _number(group / names[1])
            if limit is not None and used is not None:
                found.append((limit, max(0, used - _statistic(group / "memory.stat", names[2]))))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        return next((int(x.split()[1]) for x in path.read_text().splitlines() if x.split()[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0


def machine_key(device: str, drives: dict[int, Path]) -> str:
    """Equal where the same rates are to be expected: this machine, PyTorch, its threads, the device, the drives."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    parts = [_VERSION, platform.node(), platform.machine(), platform.processor(), os.cpu_count(), torch.__version__]
    parts += [torch.get_num_threads(), device, gpu, *sorted(str(d) for d in drives.values())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _load(path: Path) -> Hardware | None:
    try:
        return Hardware(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # nothing there, or written by something else: measure again
        return None


def _measure(
    device: str,
    drives: dict[int, Path],
    adamw: Callable[[str], float] | None,
    adamw_device: Callable[[], float] | None,
) -> Hardware:
    source = {key: "measured on this machine" for key in ("matrix_flops", "h2d", "d2h", "ram", "adamw")}
    flops = {name: _matrix_rate(getattr(torch, name), device) for name in ("bfloat16", "float32")}
    with _one_thread():  # as a lane copies
        ram = _copy_rate(*torch.ones(2, _COPY_BYTES // 4))
    h2d = d2h = ram
    link_duplex = 1.0
    if device == "cuda":
        h2d, d2h, link_duplex = _link_rates()
    reads, writes, together = 0.0, 0.0, []
    for directory in drives.values():
        read, write, duplex, how = drive_rates(directory)
        reads, writes = reads + read, writes + write
        together.append(duplex)
        source[f"nvme {directory}"] = how
    if not drives:
        reads, writes, source["nvme"] = *SLOW_DRIVE[:2], "assumed: no store path given"
    nodes = cxl_nodes()
    for node, nbytes in nodes.items():
        source[f"cxl node {node}"] = f"{nbytes} bytes of memory on a NUMA node without CPUs; its rate is assumed"
    fused = adamw("float32") if adamw else _adamw_rate()
    ratio = adamw("bfloat16") / fused if adamw else SPLIT_RATIO
    on_device = adamw_device() if adamw_device else 0.0
    source["adamw_device"] = "measured on this machine" if on_device else "not offered: not measured, or other bits"
    return Hardware(
        name=torch.cuda.get_device_name() if device == "cuda" else f"this machine ({os.cpu_count()} CPUs)",
        gpu_bytes=torch.cuda.mem_get_info()[0] if device == "cuda" else 0,
        cpu_bytes=available_ram(),
        matrix_flops=flops,
        h2d=h2d,
        d2h=d2h,
        ram=ram,
        nvme_read=reads,
        nvme_write=writes,
        adamw_parameters_per_second=fused,
        adamw_split_ratio=ratio,
        adamw_device=on_device,
        link_duplex=link_duplex,
        nvme_duplex=min(together, default=1.0),
        cores=torch.get_num_threads(),
        cxl_bytes=sum(nodes.values()),
        source=source,
    )


def _best_seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """The shortest of several runs within `_SECONDS`, the first one not counted."""
    run()
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < _SECONDS:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _matrix_rate(dtype: torch.dtype, device: str) -> float:
    size = 8192 if device == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, a, out=out), device)


def _copy_rate(source: Tensor, target: Tensor) -> float:
    device = "cuda" if source.is_cuda or target.is_cuda else "cpu"
    return source.nbytes / _best_seconds(lambda: target.copy_(source, non_blocking=True), device)


def _link_rates() -> tuple[float, float, float]:
    """(host to device, device to host) bytes per second alone, and what both reach together in units of one."""
    host_in, host_out = (torch.frombuffer(mmap.mmap(-1, _LINK_BYTES), dtype=torch.float32) for _ in range(2))
    there_in, there_out = (torch.ones(_LINK_BYTES // 4, device="cuda") for _ in range(2))
    with _page_locked(host_in), _page_locked(host_out):
        return _rates_of(host_in, host_out, there_in, there_out)


@contextmanager
def _page_locked(tensor: Tensor) -> Iterator[None]:
    """As the run's own buffers are. PyTorch's pinned allocator would keep the memory for the rest of the process."""
    cudart = torch.cuda.cudart()
    locked = int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0
    try:
        yield  # at pageable rates where the system refuses: a run says so when it reserves its own
    finally:
        if locked:
            cudart.cudaHostUnregister(tensor.data_ptr())


def _rates_of(host_in: Tensor, host_out: Tensor, there_in: Tensor, there_out: Tensor) -> tuple[float, float, float]:
    h2d, d2h = _copy_rate(host_in, there_in), _copy_rate(there_out, host_out)
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        for stream, target, source in zip(streams, (there_in, host_out), (host_in, there_out), strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    seconds = _best_seconds(both, "cuda")
    return h2d, d2h, _duplex(_LINK_BYTES / h2d + _LINK_BYTES / d2h, seconds)


def _duplex(alone: float, together: float) -> float:
    """Seconds of two transfers one after the other over seconds of both at once, within what is possible."""
    return min(2.0, max(1.0, alone / together))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _adamw_rate() -> float:
    """Parameters per second of torch's fused AdamW on float32, with one thread."""
    parameter = torch.nn.Parameter(torch.ones(4 << 20))
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    with _one_thread():
        return parameter.numel() / _best_seconds(optimizer.step)


def cxl_nodes(nodes: Path = Path("/sys/devices/system/node")) -> dict[int, int]:
    """Bytes of memory by NUMA node that has memory and no CPUs: CXL cards and the like."""
    found = {}
    for node in nodes.glob("node[0-9]*"):
        try:
            cpus, total = (node / "cpulist").read_text().strip(), (node / "meminfo").read_text()
        except OSError:
            continue
        kib = next((int(line.split()[3]) for line in total.splitlines() if "MemTotal" in line), 0)
        if not cpus and kib:
            found[int(node.name[4:])] = kib * 1024
    return dict(sorted(found.items()))
