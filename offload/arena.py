"""The device tier's one reservation: every buffer lies at the offset that the plan's layout gives it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from offload.device import Device
from offload.io import Ledger
from offload.planner import Plan


class DeviceArena:
    """`layout.arena_bytes` of the device, reserved at once and counted in the ledger by category."""

    def __init__(self, plan: Plan, device: Device, ledger: Ledger) -> None:
        self._plan = plan
        categories: Counter[str] = Counter()
        for b in plan.buffers:
            if b.tier == "gpu":
                categories[b.category] += b.total
        nbytes = plan.layout["arena_bytes"]
        self._memory = device.allocate(nbytes, ledger, categories) if nbytes else None

    def slots(self, name: str) -> list[Tensor]:
        """The buffers called `name`, 1-D uint8 that begin on pages; none where the plan needs none of them.

        Each has a storage and a version counter of its own: what is written into one slot must not look like a change
        of the weights in another, and what autograd saves is told apart by storage.
        """
        wanted = self._plan.buffer(name)
        if wanted is None or self._memory is None:
            return []
        offsets = self._plan.layout["offsets"][name]
        return [torch.from_dlpack(self._memory[at : at + wanted.nbytes]) for at in offsets]
