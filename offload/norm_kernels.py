"""The numba kernel of `offload.norms`; importing this module compiles it or takes it from numba's cache."""
# numba's types know nothing of an intrinsic's hidden first argument.
# mypy: disable-error-code="call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import float32, int16, int64

from offload.adamw_kernels import compiled, widen

LANES = 8


@compiled(float32(int16[::1]))
def norm(bits):  # type: ignore[no-untyped-def]
    """The 2-norm of bfloat16 values given as bits, summed in the order of torch's ReduceOpsKernel.cpp: one sum for each
    of the LANES floats of its vectors, these added up in order, then what is left beyond a multiple of LANES.

    Squares of bfloat16 values are exact in float32, so it does not matter where multiply and add are fused.
    """
    zero = np.float32(0)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
    end = bits.size - bits.size % int64(LANES)
    for i in range(0, end, LANES):
        x0, x1, x2, x3 = widen(bits[i]), widen(bits[i + 1]), widen(bits[i + 2]), widen(bits[i + 3])
        x4, x5, x6, x7 = widen(bits[i + 4]), widen(bits[i + 5]), widen(bits[i + 6]), widen(bits[i + 7])
        s0, s1, s2, s3 = s0 + x0 * x0, s1 + x1 * x1, s2 + x2 * x2, s3 + x3 * x3
        s4, s5, s6, s7 = s4 + x4 * x4, s5 + x5 * x5, s6 + x6 * x6, s7 + x7 * x7
    total = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7
    for i in range(end, bits.size):
        x = widen(bits[i])
        total = total + x * x
    return np.sqrt(total)
