"""AdamW on device memory, to the bit what the CPU's fused kernel computes (`offload.adamw`).

CUDA's own fused AdamW rounds otherwise: its compiler contracts products and sums where it likes. So this one is made of
stock element-wise operations, one for each rounding of the CPU's kernel, whose order is in `offload.adamw_kernels`.
Multiply-adds of one rounding are taken from operations that GPU compilers contract, or, where they do not, made from
float64 with rounding to odd. Nobody promises the former, so `find` compares the bits on the device it runs on.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload import adamw_jit
from offload.adamw import Chunk, Hyper, Piece
from offload.planner.memory import DEVICE_SCRATCH

# Parameters of one measurement of the rate, and how often it is taken.
_TIMED_ELEMENTS = 4 << 20
_TIMED_REPEATS = 5


@dataclass(frozen=True)
class Form:
    """How a device comes to the CPU's bits.

    lanes: elements that the CPU's kernel takes at a time; what a parameter has beyond a multiple of it is rounded in
    another order. single: `add` with a factor, `addcmul` and `sqrt` have a single, right rounding on the device.
    """

    lanes: int
    single: bool


class DeviceAdamW:
    """AdamW over pieces of a chunk that lies on the device; launches and returns.

    Args:
        scratch: uint8 on the device, overwritten: windows of as many elements as fit are updated one after the other.
    """

    def __init__(self, form: Form, scratch: Tensor) -> None:
        self._form = form
        # float64 first, so that each begins at a multiple of its element size
        dtypes = [*([] if form.single else [torch.float64] * 4), *[torch.float32] * 5]
        self._window = scratch.numel() // sum(dtype.itemsize for dtype in dtypes) // 64 * 64
        parts, at = [], 0
        for dtype in dtypes:
            nbytes = self._window * dtype.itemsize
            parts.append(scratch[at : at + nbytes].view(dtype))
            at += nbytes
        self._wide, self._scratch = parts[:-5], parts[-5:]

    def part(self, chunk: Chunk, pieces: Sequence[Piece], hyper: Hyper) -> None:
        """One AdamW step in place over some pieces of a chunk; `hyper.coefficient` is on the host."""
        for start, stop, step in pieces:
            root = math.sqrt(1 - hyper.beta2**step)
            correction = torch.full((), root, dtype=torch.float32, device=chunk.param.device)
            for first in range(start, stop, self._window):
                end = min(first + self._window, stop)
                tail = (end - first) % self._form.lanes if end == stop else 0
                self._update(chunk.between(first, end), tail, correction, step, hyper)

    def _update(self, chunk: Chunk, tail: int, correction: Tensor, step: int, hyper: Hyper) -> None:
        """AdamW over a window, whose last `tail` elements are the end of a parameter beyond its last whole vector."""
        m, v, low, n = chunk.exp_avg, chunk.exp_avg_sq, chunk.low, chunk.param.numel()
        master, g, a, b, c = (scratch[:n] for scratch in self._scratch)
        g.copy_(chunk.grad)
        if hyper.coefficient is not None:
            g.mul_(hyper.coefficient.item())
        whole = chunk.param if low is None else _merge(chunk.param, low, v, master, a)
        torch.sub(g, m, out=a)
        weight = _float32(1 - hyper.beta1)
        if weight < 0.5:  # as torch's lerp has it
            self._multiply_add(weight, a, m, out=m)
        else:
            self._multiply_add(weight - 1, a, g, out=m)
        self._second_moment(v, g, n - tail, hyper, a, b)
        self._root(v, out=a)
        a.div_(correction)  # a tensor on the device: by a number on the host CUDA multiplies with its inverse
        a.add_(hyper.eps)
        torch.mul(m, -(hyper.lr / (1 - hyper.beta1**step)), out=b)
        b.div_(a)
        whole.mul_(1 - hyper.lr * hyper.weight_decay)
        whole.add_(b)
        if low is not None:
            _split(whole, chunk.param, low, v, c)

    def _second_moment(self, v: Tensor, g: Tensor, tail: int, hyper: Hyper, a: Tensor, b: Tensor) -> None:
        """v = beta2 v + (1 - beta2) g g, where the elements from `tail` on are rounded in another order."""
        torch.mul(g, 1 - hyper.beta2, out=a)
        if tail:
            torch.mul(v[:tail], hyper.beta2, out=b[:tail])
            self._multiply_add(a[:tail], g[:tail], b[:tail], out=v[:tail])
        if tail < v.numel():
            a[tail:].mul_(g[tail:])
            self._multiply_add(hyper.beta2, v[tail:], a[tail:], out=v[tail:])

    def _root(self, x: Tensor, out: Tensor) -> None:
        """out = the root of x. Taken in float64 first, it is rounded right where the device's own is not."""
        if self._form.single:
            torch.sqrt(x, out=out)
        else:
            out.copy_(self._wide[0][: x.numel()].copy_(x).sqrt_())

    def _multiply_add(self, factor: Tensor | float, x: Tensor, y: Tensor, out: Tensor) -> None:
        """out = factor x + y, float32, with one rounding; `out` may be `x` or `y`."""
        if self._form.single:
            if isinstance(factor, float):
                torch.add(y, x, alpha=factor, out=out)
            else:
                torch.addcmul(y, factor, x, out=out)
            return
        # Of two float32 the product is exact in float64. Their sum with a third is rounded to odd, after which the
        # rounding to float32 is as if it were the only one (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008).
        product, addend, total, rest = (t[: x.numel()] for t in self._wide)
        product.copy_(x)
        if isinstance(factor, float):
            product.mul_(_float32(factor))
        else:
            product.mul_(addend.copy_(factor))
        addend.copy_(y)
        torch.add(product, addend, out=total)
        # what the sum lost (Knuth's TwoSum): (product - (total - part)) + (addend - part), part = total - product
        torch.sub(total, product, out=rest)
        addend.sub_(rest)
        torch.sub(total, rest, out=rest)
        product.sub_(rest).add_(addend).sign_()
        bits, odd, away = total.view(torch.int64), addend.view(torch.int64), rest.view(torch.int64)
        away.copy_(product.mul_(torch.sign(total, out=addend)))  # 1 away from zero, -1 towards it, 0: nothing was lost
        torch.bitwise_and(bits, 1, out=odd)
        bits.add_(away.mul_(odd.bitwise_xor_(1)))
        out.copy_(total)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _merge(weight: Tensor, low: Tensor, exp_avg_sq: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """As `adamw.merge_master`, without a look at the values: that would wait for the device."""
    bits, marks, wide = out.view(torch.int32), exp_avg_sq.view(torch.int32), scratch.view(torch.int32)
    wide.copy_(low)
    bits.copy_(weight.view(torch.int16))
    torch.add(wide, bits, alpha=65536, out=bits)
    torch.bitwise_right_shift(marks, 31, out=wide)  # -1 where marked, else 0
    bits.sub_(wide, alpha=65536)
    exp_avg_sq.abs_()
    return out


def _split(master: Tensor, weight: Tensor, low: Tensor, exp_avg_sq: Tensor, scratch: Tensor) -> None:
    """As `adamw.split_master`, without a look at the values."""
    exp_avg_sq.abs_()  # a NaN comes with any sign
    weight.copy_(master)
    low.copy_(master.view(torch.int32))
    wide = scratch.view(torch.int32)
    scratch.copy_(weight)
    torch.sub(master.view(torch.int32), wide, out=wide)
    exp_avg_sq.view(torch.int32).bitwise_or_(wide.eq_(32768).bitwise_left_shift_(31))


@functools.cache
def find(device: torch.device) -> Form | None:
    """The form that gives the bits of the CPU on this device, None if none does; tried once per process."""
    forms = [Form(lanes, single) for single in (True, False) for lanes in adamw_jit.LANES]
    scratch = torch.empty(DEVICE_SCRATCH, dtype=torch.uint8, device=device)
    return next((form for form in forms if _equal_bits(DeviceAdamW(form, scratch), device)), None)


def _equal_bits(kernel: DeviceAdamW, device: torch.device) -> bool:
    kinds = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    # with a first beta up to 0.5 torch takes another formula
    return all(adamw_jit.equal_bits(kernel, *kind, device, beta1) for kind in kinds for beta1 in (0.9, 0.3))


def rate(device: torch.device) -> float:
    """Parameters per second on the device and the split bfloat16 state; 0 where its bits are not those of the CPU."""
    form = find(device)
    if form is None:
        return 0.0
    kernel = DeviceAdamW(form, torch.empty(DEVICE_SCRATCH, dtype=torch.uint8, device=device))
    n, zeros = _TIMED_ELEMENTS, functools.partial(torch.zeros, _TIMED_ELEMENTS, device=device)
    chunk = Chunk(zeros(dtype=torch.bfloat16), zeros(dtype=torch.int16), zeros(dtype=torch.bfloat16), zeros(), zeros())
    best = math.inf
    for _ in range(_TIMED_REPEATS):
        _synchronize(device)
        begin = time.perf_counter()
        kernel.part(chunk, [(0, n, 1)], Hyper(1e-3, 0.9, 0.999, 1e-8, 0.0, None))
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return n / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
