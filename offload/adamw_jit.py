"""AdamW compiled by numba: one pass over a chunk that merges, updates and splits the master, to the bit as torch does.

The order of operations and the places of fused multiply-adds are those of torch's FusedAdamKernel.cpp as its compiler
contracted it: whole vectors and the tail of a tensor differ in the second moment. They were found by comparing bits, so
`load` compares them again on the machine it runs on and offers only what is equal, and only where it is faster.
Each kernel has one signature and so a cache file of its own, which numba replaces as a whole: several processes may
compile at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from offload import heap
from offload.adamw import Chunk, Hyper, Piece, Stock

# What numba and the kernels were seen to take (40 MiB), and some more.
LOADED_BYTES = 48 << 20
# Elements that torch's compiled code takes at a time, most likely first: what is left of a tensor beyond a multiple of
# it is its tail. It depends on the compiler too: with vectors of 16 floats, the tail's loop was made to take 8.
LANES = (8, 16, 4)
# What the check runs over: every length of tail, and enough values to meet ties and every branch.
_CHECK_ELEMENTS = 48 * 1024
_CHECK_TAILS = range(1, 18)
_HOST = torch.device("cpu")
_TIMED_ELEMENTS = 128 * 1024
_TIMED_REPEATS = 5

Kernels = dict[tuple[torch.dtype, torch.dtype], Callable[..., None]]


@dataclass(frozen=True)
class Loaded:
    """What may be used, None if nothing, and the reason why not for the other kinds of chunk."""

    jit: Jit | None
    reasons: dict[str, str]


class Jit:
    """Runs the kernels of `load` on parts of a chunk. Holds no memory."""

    def __init__(self, kernels: Kernels, lanes: int) -> None:
        self._kernels = kernels
        self.lanes = lanes

    def takes(self, chunk: Chunk, hyper: Hyper) -> bool:
        """Whether there is a kernel for these dtypes; beta1 up to 0.5 takes torch another formula."""
        return (chunk.param.dtype, chunk.grad.dtype) in self._kernels and bool(np.float32(1 - hyper.beta1) < 0.5)

    def part(self, chunk: Chunk, pieces: Sequence[Piece], hyper: Hyper) -> None:
        """One AdamW step in place over some pieces of a chunk."""
        kernel = self._kernels[chunk.param.dtype, chunk.grad.dtype]
        tensors = (chunk.param, chunk.low, chunk.grad, chunk.exp_avg, chunk.exp_avg_sq)
        arrays = [_array(tensor) for tensor in tensors if tensor is not None]
        scale = 1.0 if hyper.coefficient is None else float(hyper.coefficient)
        for start, stop, step in pieces:
            kernel(*(a[start:stop] for a in arrays), self.lanes, *_constants(hyper, scale, step))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as numpy sees it; bfloat16 as its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _constants(hyper: Hyper, scale: float, step: int) -> tuple[np.float32, ...]:
    """In double precision until the last moment, as torch computes them."""
    values = (
        scale,
        1 - hyper.lr * hyper.weight_decay,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        math.sqrt(1 - hyper.beta2**step),
        hyper.eps,
        -(hyper.lr / (1 - hyper.beta1**step)),
    )
    return tuple(np.float32(value) for value in values)


_lock = threading.Lock()
_loaded: Loaded | None = None


def load() -> Loaded:
    """Compile the kernels, or take them from numba's cache, check and time them; once per process. Raises nothing.

    Takes about a second without numba's cache, a few tenths with it, most of it numba's own import.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            with heap.in_footprint(LOADED_BYTES):
                _loaded = _load()
        return _loaded


def _load() -> Loaded:
    try:
        compiled = compile_kernels()
    except ImportError:
        return Loaded(None, {"all": "numba is not installed (pip install 'offload[jit]')"})
    except Exception as error:  # whatever a compiler can fail with, training goes on without it
        return Loaded(None, {"all": f"numba could not compile: {type(error).__name__}: {error}"})
    lanes = next((n for n in LANES if all(equal_bits(Jit(compiled, n), *dtypes) for dtypes in compiled)), None)
    if lanes is None:
        return Loaded(None, {"all": "on this processor their bits are not those of torch's kernel"})
    every = Jit(compiled, lanes)
    usable = {dtypes: kernel for dtypes, kernel in compiled.items() if faster(every, *dtypes)}
    reasons = {
        "{} with {} gradients".format(*(str(dtype).removeprefix("torch.") for dtype in dtypes)): "no faster here"
        for dtypes in compiled.keys() - usable.keys()
    }
    return Loaded(Jit(usable, lanes), reasons)


def compile_kernels() -> Kernels:
    """All kernels, unchecked. Raises ImportError where numba is not installed."""
    from offload import adamw_kernels

    return adamw_kernels.KERNELS


class Worker(Protocol):
    """AdamW over parts of a chunk."""

    def part(self, chunk: Chunk, pieces: Sequence[Piece], hyper: Hyper) -> None:
        """One AdamW step in place over some pieces of a chunk."""
        ...


def equal_bits(
    worker: Worker,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device = _HOST,
    beta1: float = 0.9,
) -> bool:
    """Whether two steps over random state on the device leave the bits that stock operations leave on the CPU."""
    generator = torch.Generator().manual_seed(0)
    stock = Stock()
    for number, weight_decay in enumerate((0.0, 0.1)):
        chunk, pieces = _sample(generator, _CHECK_ELEMENTS, param_dtype, grad_dtype)
        expected = chunk.clone()
        chunk = chunk.to(device)
        coefficient = torch.tensor(0.37) if number else None
        for step in (1, 2):
            hyper = Hyper(1e-3, beta1, 0.999, 1e-8, weight_decay, coefficient)
            counted = [(start, stop, step) for start, stop, _ in pieces]
            worker.part(chunk, counted, hyper)
            stock.part(expected, counted, hyper)
        if not chunk.to(_HOST).same_bits(expected):
            return False
    return True


def _sample(
    generator: torch.Generator, numel: int, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> tuple[Chunk, list[Piece]]:
    """A chunk of values over many magnitudes, zeros and denormals among them, and pieces with every length of tail."""

    def spread(low: int, high: int) -> Tensor:
        exponent = torch.randint(low, high, (numel,), generator=generator)
        return torch.randn(numel, generator=generator) * torch.exp2(exponent.float())

    param, exp_avg = spread(-30, 3), spread(-40, 3)
    exp_avg_sq, grad = spread(-130, 3).square(), spread(-60, 6)
    grad[::7], exp_avg_sq[::11] = 0.0, 0.0
    pieces, at = [], 0
    for tail in _CHECK_TAILS:
        pieces.append((at, at + 64 + tail, 1))
        at += 128
    pieces.append((at, numel, 1))
    low = torch.randint(-(2**15), 2**15, (numel,), generator=generator, dtype=torch.int16)
    low[::13] = 0
    chunk = Chunk(
        param.to(param_dtype), low if param_dtype == torch.bfloat16 else None, grad.to(grad_dtype), exp_avg, exp_avg_sq
    )
    return chunk, pieces


def faster(jit: Jit, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> bool:
    """Whether the kernel's best time over a chunk is below that of stock operations, on this thread; a few ms."""
    generator = torch.Generator().manual_seed(0)
    chunk, _ = _sample(generator, _TIMED_ELEMENTS, param_dtype, grad_dtype)
    hyper = Hyper(1e-3, 0.9, 0.999, 1e-8, 0.1, None)
    stock, best = Stock(), {"jit": math.inf, "stock": math.inf}
    for _ in range(_TIMED_REPEATS):
        for name, worker in (("jit", jit), ("stock", stock)):
            begin = time.perf_counter()
            worker.part(chunk, [(0, _TIMED_ELEMENTS, 1)], hyper)
            best[name] = min(best[name], time.perf_counter() - begin)
    return best["jit"] < best["stock"]
