"""What torch keeps per thread, and what a switch between coroutines would therefore leak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ThreadState:
    """What torch keeps per thread and a coroutine switch would leak: RNG, grad mode and autocast."""

    rng: Tensor
    cuda_rng: Tensor | None
    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype
    autocast_cache: bool

    @classmethod
    def now(cls, device: str) -> ThreadState:
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if device == "cuda" else None,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.is_autocast_cache_enabled(),
        )

    def apply(self, device: str) -> None:
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None:
            torch.cuda.set_rng_state(self.cuda_rng)
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_enabled(device, self.autocast)
        torch.set_autocast_dtype(device, self.autocast_dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)


@contextmanager
def thread_state(state: ThreadState, device: str) -> Iterator[None]:
    """Run with `state` and put the caller's own state back."""
    mine = ThreadState.now(device)
    state.apply(device)
    try:
        yield
    finally:
        mine.apply(device)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Autocast keeps casts of weights by parameter: without graph if made in the first pass, stale after a refill."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
