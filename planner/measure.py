"""Measure this machine in about two seconds, once: matrix products, copies, the optimizer, the drives.

Rates are cached per machine and store path; how much RAM is free is looked up every time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from offload.planner.plan import Hardware
from torch import Tensor

SYSTEM_SHARE = 0.10  # of RAM, left to the system ...
SYSTEM_BYTES = 2 << 30  # ... and at least this much
_VERSION = 1  # of what is measured and how; part of the cache key
_FILE_BYTES = 128 << 20
_BLOCK = 8 << 20
_SECONDS = 0.15  # per measurement
_DRIVE_SECONDS = 0.6  # per direction, after which no new block is started
_QUEUE = 4  # blocks in flight


def probe(device: str, store_paths: Sequence[str | Path] = (), refresh: bool = False) -> Hardware:
    """This machine's `Hardware`, measured now or, unless `refresh`, taken from the cache.

    `device` is "cpu" or "cuda". A store path that does not exist is measured at its nearest existing parent; paths on
    one file system count once. A path that cannot be written counts at a slow drive's rates, and `source` says so.
    Raises ValueError for "cuda" without a CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("memory.device is 'cuda', but there is no CUDA device here; use 'cpu' or 'auto'")
    drives = _file_systems(store_paths)
    cache = cache_directory() / f"hardware-{_machine_key(device, drives)}.json"
    if not refresh:
        cached = _load(cache)
        if cached is not None:
            return replace(cached, cpu_bytes=available_ram())
    measured = _measure(device, drives)
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


def _file_systems(paths: Sequence[str | Path]) -> dict[int, Path]:
    """One existing directory per file system under the paths."""
    found: dict[int, Path] = {}
    for path in paths:
        directory = Path(path).expanduser().absolute()
        while not directory.is_dir():
            directory = directory.parent
        found.setdefault(os.stat(directory).st_dev, directory)
    return found


def _machine_key(device: str, drives: dict[int, Path]) -> str:
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    parts = [_VERSION, platform.node(), platform.machine(), platform.processor(), os.cpu_count(), torch.__version__]
    parts += [torch.get_num_threads(), device, gpu, *sorted(str(d) for d in drives.values())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _load(path: Path) -> Hardware | None:
    try:
        return Hardware(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # nothing there, or written by something else: measure again
        return None


def _measure(device: str, drives: dict[int, Path]) -> Hardware:
    source = {key: "measured on this machine" for key in ("matrix_flops", "h2d", "d2h", "ram", "adamw")}
    flops = {name: _matrix_rate(getattr(torch, name), device) for name in ("bfloat16", "float32")}
    ram = _copy_rate(torch.ones(_FILE_BYTES // 4), torch.zeros(_FILE_BYTES // 4))
    h2d = d2h = ram
    if device == "cuda":
        host = torch.zeros(_FILE_BYTES // 4).pin_memory()
        there = torch.ones(_FILE_BYTES // 4, device="cuda")
        h2d, d2h = _copy_rate(host, there), _copy_rate(there, host)
    reads, writes = 0.0, 0.0
    for directory in drives.values():
        read, write, how = _drive_rates(directory)
        reads, writes = reads + read, writes + write
        source[f"nvme {directory}"] = how
    if not drives:
        reads, writes, source["nvme"] = *_SLOW_DRIVE, "assumed: no store path given"
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
        adamw_parameters_per_second=_adamw_rate(),
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
    return source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _adamw_rate() -> float:
    parameter = torch.nn.Parameter(torch.ones(4 << 20))
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    return parameter.numel() / _best_seconds(optimizer.step)


_SLOW_DRIVE = (2.0e9, 1.0e9)


def _drive_rates(directory: Path) -> tuple[float, float, str]:
    """(read, write) bytes per second of the file system at `directory`, and how they were found."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".offload-probe-", dir=directory)
    except OSError as error:
        return *_SLOW_DRIVE, f"assumed: {directory} cannot be written ({error.strerror})"
    os.close(descriptor)
    try:
        direct = getattr(os, "O_DIRECT", 0)
        try:
            file = os.open(name, os.O_RDWR | direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            direct, file = 0, os.open(name, os.O_RDWR)
        try:
            blocks, write = _transfer(file, _FILE_BYTES // _BLOCK, os.pwrite)
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            _, read = _transfer(file, blocks, lambda f, buffer, offset: os.preadv(f, [buffer], offset))
        finally:
            os.close(file)
    except OSError as error:
        return *_SLOW_DRIVE, f"assumed: measuring at {directory} failed ({error.strerror})"
    finally:
        os.unlink(name)
    return read, write, "measured with O_DIRECT" if direct else "measured through the page cache: no O_DIRECT here"


def _transfer(file: int, blocks: int, move: Callable[[int, mmap.mmap, int], int]) -> tuple[int, float]:
    """Move up to `blocks` blocks, `_QUEUE` at a time, and sync; returns the blocks moved and bytes per second."""
    buffers = [mmap.mmap(-1, _BLOCK) for _ in range(_QUEUE)]
    for buffer in buffers:
        buffer.write(os.urandom(4096) * (_BLOCK // 4096))  # a drive that compresses must not look fast
    begin, moved = time.perf_counter(), 0
    with ThreadPoolExecutor(_QUEUE) as pool:
        while moved < blocks and time.perf_counter() - begin < _DRIVE_SECONDS:
            batch = range(moved, min(moved + _QUEUE, blocks))
            sizes = list(pool.map(lambda i: move(file, buffers[i % _QUEUE], i * _BLOCK), batch))
            if any(size != _BLOCK for size in sizes):
                raise OSError(errno.EIO, "short transfer")
            moved += len(batch)
    os.fsync(file)
    seconds = time.perf_counter() - begin
    for buffer in buffers:
        buffer.close()
    return moved, moved * _BLOCK / seconds
