"""Norms of gradients, to the bit as `clip_grad_norm_` takes them: of each parameter without a float32 copy, and of all.

`torch.linalg.vector_norm` of bfloat16 values in float32 first makes such a copy, twice the gradient's size: as much
memory outside of the plan, and on a CPU most of the time that the gradient lane took. A compiled kernel sums in torch's
order as it reads; it is used where numba is installed and the bits are the same.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from offload.device import limit_lane_threads
from offload.errors import OffloadError

# Lengths that the check runs over: every tail, and sums long enough to round at each step.
_CHECK_LENGTHS = (*range(1, 25), 1000, 4099, 65_536, 300_007)

_Kernel = Callable[[Any], float]


def clipping(
    norms: Mapping[str, Tensor], order: Mapping[str, int], limit: float | None
) -> tuple[float, Tensor | None]:
    """The global norm and the clipping coefficient, to the bit those of `torch.nn.utils.clip_grad_norm_`.

    Args:
        norms: of each parameter's gradient, float32 scalars. order: of all parameters, as the model has them.
        limit: the largest norm; None and a coefficient of 1 give no coefficient.
    """
    if not norms:
        raise OffloadError("no parameter got a gradient; check requires_grad and the batch's labels")
    total = torch.linalg.vector_norm(torch.stack([norms[name] for name in sorted(norms, key=order.__getitem__)]))
    if limit is None:
        return total.item(), None
    coefficient = torch.clamp(limit / (total + 1e-6), max=1.0)
    return total.item(), None if coefficient.item() == 1.0 else coefficient


class Norms:
    """Norms in float32. Until the kernel is loaded, on a thread of its own, torch's operation takes them."""

    def __init__(self) -> None:
        self._kernel: _Kernel | None = None
        self._loader = threading.Thread(target=self._load, name="norm-jit")
        self._loader.start()

    def __call__(self, values: Tensor) -> Tensor:
        """The 2-norm of a 1-D tensor on the CPU, as a float32 scalar; infinite or NaN where a value or the sum is."""
        kernel = self._kernel
        if kernel is None or values.dtype != torch.bfloat16:
            return torch.linalg.vector_norm(values, dtype=torch.float32)
        return torch.tensor(kernel(values.view(torch.int16).detach().numpy()), dtype=torch.float32)

    def wait(self) -> None:
        """Return when the kernel is in use or known to be of no use."""
        self._loader.join()

    def _load(self) -> None:
        limit_lane_threads()
        self._kernel = load()


@functools.cache
def load() -> _Kernel | None:
    """The kernel, compiled and checked; None without numba or where its bits are not torch's."""
    try:
        from offload.norm_kernels import norm
    except Exception:  # not installed, or whatever a compiler can fail with: torch's own operation is always there
        return None
    return norm if _equal_bits(norm) else None


def _equal_bits(norm: _Kernel) -> bool:
    generator = torch.Generator().manual_seed(0)
    for length in _CHECK_LENGTHS:
        scale = torch.exp2(torch.randint(-20, 4, (length,), generator=generator).float())
        values = (torch.randn(length, generator=generator) * scale).bfloat16()
        expected = torch.linalg.vector_norm(values, dtype=torch.float32).item()
        if norm(values.view(torch.int16).numpy()) != expected:
            return False
    return True
