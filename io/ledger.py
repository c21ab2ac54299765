"""Account of reserved bytes per tier and category, with high-water marks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Account:
    now: int = 0
    peak: int = 0

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


class Ledger:
    """Thread-safe count of bytes in use, by tier ("gpu", "cpu", "cxl", "nvme") and category (any name)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tiers: dict[str, _Account] = {}
        self._categories: dict[str, dict[str, _Account]] = {}
        # Called after every change with tier, category and the bytes that were added (negative: removed).
        self.observer: Callable[[str, str, int], None] | None = None

    def add(self, tier: str, category: str, nbytes: int) -> None:
        """Count `nbytes` more. Raises ValueError for a negative number."""
        if nbytes < 0:
            raise ValueError(f"ledger: cannot add {nbytes} bytes to {tier}/{category}; use remove()")
        with self._lock:
            self._tiers.setdefault(tier, _Account()).add(nbytes)
            self._categories.setdefault(tier, {}).setdefault(category, _Account()).add(nbytes)
        if self.observer is not None:
            self.observer(tier, category, nbytes)

    def remove(self, tier: str, category: str, nbytes: int) -> None:
        """Count `nbytes` less. Raises ValueError when the category does not hold that many."""
        with self._lock:
            account = self._categories.get(tier, {}).get(category)
            held = 0 if account is None else account.now
            if account is None or not 0 <= nbytes <= held:
                raise ValueError(f"ledger: cannot remove {nbytes} bytes from {tier}/{category}, which holds {held}")
            account.now -= nbytes
            self._tiers[tier].now -= nbytes
        if self.observer is not None:
            self.observer(tier, category, -nbytes)

    def in_use(self, tier: str) -> int:
        """Bytes in use now."""
        with self._lock:
            return self._tiers[tier].now if tier in self._tiers else 0

    def peak(self, tier: str) -> int:
        """Most bytes in use at one time since the start or the last reset_peaks()."""
        with self._lock:
            return self._tiers[tier].peak if tier in self._tiers else 0

    def snapshot(self) -> dict[str, dict[str, dict[str, int]]]:
        """{tier: {category: {"bytes": in use now, "peak": high-water mark}}}."""
        with self._lock:
            return {
                tier: {name: {"bytes": account.now, "peak": account.peak} for name, account in categories.items()}
                for tier, categories in self._categories.items()
            }

    def reset_peaks(self) -> None:
        """Start every high-water mark afresh from what is in use now."""
        with self._lock:
            for account in self._tiers.values():
                account.peak = account.now
            for categories in self._categories.values():
                for account in categories.values():
                    account.peak = account.now
