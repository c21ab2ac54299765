"""The numba kernels of `offload.adamw_jit`; importing this module compiles them or takes them from numba's cache.

`contract` is never allowed, so a multiply-add is fused where `_fma` says so and nowhere else. Division by zero is as in
C (`error_model="numpy"`): without it no loop is vectorised.
"""
# numba's types know nothing of an intrinsic's hidden first argument.
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, int16, int32, int64, types
from numba.extending import intrinsic

_SIGN = np.int32(31)


@intrinsic
def _fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""
    return float32(float32, float32, float32), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def _bits(_: Any, value: Any) -> Any:
    return int32(float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _real(_: Any, bits: Any) -> Any:
    return float32(int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def widen(_: Any, value: Any) -> Any:
    """A float32 as it is, or the bits of a bfloat16 (int16) as the float32 they stand for."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(value, types.Float):
            return args[0]
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return float32(value), generate


def _inner(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, error_model="numpy")(function)


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile for one signature, cached where numba finds a place to write."""

    def compile_now(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, nogil=True, error_model="numpy", cache=True)(function)
        except RuntimeError:  # no directory to keep a cache in
            return numba.njit(signature, nogil=True, error_model="numpy")(function)

    return compile_now


def _cached(*types: Any) -> Callable[[Callable[..., None]], Any]:
    return compiled(numba.void(*types, int64, *[float32] * 8))


@_inner
def _updated(p, g, m, v, whole, decay, w1, beta2, w2, correction, eps, rate):  # type: ignore[no-untyped-def]
    """AdamW of one element: (parameter, first moment, second moment), in torch's order of operations."""
    m = _fma(w1, g - m, m)
    if whole:
        v = _fma(w2 * g, g, v * beta2)
    else:
        v = _fma(v, beta2, w2 * g * g)
    return p * decay + rate * m / (np.sqrt(v) / correction + eps), m, v


@_inner
def _merged(p, low, v):  # type: ignore[no-untyped-def]
    """(master, second moment without its mark): see `adamw.merge_master`."""
    mark = _bits(v)
    master = np.int32((np.int32(p) - (mark >> _SIGN)) << np.int32(16)) + np.int32(low)
    return _real(np.int32(master)), _real(mark & np.int32(0x7FFFFFFF))


@_inner
def _split(master, v):  # type: ignore[no-untyped-def]
    """(bfloat16 bits, low half, second moment with its mark): see `adamw.split_master`.

    Adding half of the last place rounds to nearest, ties up; a tie above an even half has to go down, and is marked.
    """
    bits = _bits(master)
    down = np.int32(bits & np.int32(0x1FFFF)) == np.int32(0x8000)
    high = np.int32(bits + (np.int32(0x7FFF) if down else np.int32(0x8000))) >> np.int32(16)
    if master != master:
        high = np.int32(0x7FC0)  # rounding could carry a NaN into a number
    return high, bits, -v if down else v


@_inner
def _split_loop(param, low, grad, exp_avg, exp_avg_sq, first, stop, whole, scale, a, b, c, d, e, f, h):  # type: ignore[no-untyped-def]
    for i in range(first, stop):
        p, v = _merged(param[i], low[i], exp_avg_sq[i])
        p, m, v = _updated(p, widen(grad[i]) * scale, exp_avg[i], v, whole, a, b, c, d, e, f, h)
        high, bits, v = _split(p, v)
        param[i], low[i], exp_avg[i], exp_avg_sq[i] = high, bits, m, v


@_inner
def _plain_loop(param, grad, exp_avg, exp_avg_sq, first, stop, whole, scale, a, b, c, d, e, f, h):  # type: ignore[no-untyped-def]
    for i in range(first, stop):
        p, m, v = _updated(param[i], grad[i] * scale, exp_avg[i], exp_avg_sq[i], whole, a, b, c, d, e, f, h)
        param[i], exp_avg[i], exp_avg_sq[i] = p, m, v


_I16, _F32 = int16[::1], float32[::1]


@_cached(_I16, _I16, _I16, _F32, _F32)
def split_widening(param, low, grad, exp_avg, exp_avg_sq, lanes, scale, a, b, c, d, e, f, h):  # type: ignore[no-untyped-def]
    """Split master, bfloat16 gradients."""
    end = param.size - param.size % lanes
    _split_loop(param, low, grad, exp_avg, exp_avg_sq, 0, end, True, scale, a, b, c, d, e, f, h)
    _split_loop(param, low, grad, exp_avg, exp_avg_sq, end, param.size, False, scale, a, b, c, d, e, f, h)


@_cached(_I16, _I16, _F32, _F32, _F32)
def split(param, low, grad, exp_avg, exp_avg_sq, lanes, scale, a, b, c, d, e, f, h):  # type: ignore[no-untyped-def]
    """Split master, float32 gradients."""
    end = param.size - param.size % lanes
    _split_loop(param, low, grad, exp_avg, exp_avg_sq, 0, end, True, scale, a, b, c, d, e, f, h)
    _split_loop(param, low, grad, exp_avg, exp_avg_sq, end, param.size, False, scale, a, b, c, d, e, f, h)


@_cached(_F32, _F32, _F32, _F32)
def plain(param, grad, exp_avg, exp_avg_sq, lanes, scale, a, b, c, d, e, f, h):  # type: ignore[no-untyped-def]
    """Float32 parameters and gradients."""
    end = param.size - param.size % lanes
    _plain_loop(param, grad, exp_avg, exp_avg_sq, 0, end, True, scale, a, b, c, d, e, f, h)
    _plain_loop(param, grad, exp_avg, exp_avg_sq, end, param.size, False, scale, a, b, c, d, e, f, h)


KERNELS = {
    (torch.bfloat16, torch.bfloat16): split_widening,
    (torch.bfloat16, torch.float32): split,
    (torch.float32, torch.float32): plain,
}
