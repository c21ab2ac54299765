"""Several processes on one zeroth-order step: each runs some of the forward passes, and all learn all losses.

Perturbation and data parallelism after DistZO2, in one rule: the (branch, micro-batch) pairs of a walk are dealt out in
order. With two processes one has the plus and one the minus branch; with more, branches are split by micro-batches.
Every process keeps all weights and applies every update, from the same scalars: nothing else is sent, and no number
depends on how many processes there are.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from offload.config import Config
from offload.errors import ConfigError


def world() -> tuple[int, int]:
    """How many processes `torchrun` started, and which of them this is."""
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def own_config(cfg: Config) -> Config:
    """The configuration with the run directory of this process: every one but the first has its own beside the first's.

    Raises ConfigError for several processes where nothing can be shared out.
    """
    count, rank = world()
    if count > 1 and cfg.train.method != "zo":
        raise ConfigError(
            f"train.method: got {cfg.train.method!r} in {count} processes (WORLD_SIZE); accepted: 'zo', or one process"
        )
    return cfg if rank == 0 else Config.load(cfg, [f"output={cfg.output.rstrip('/')}-rank{rank}"])


class Processes:
    """The processes that `torchrun` started; alone without it. `close` leaves the group that was joined here."""

    def __init__(self) -> None:
        self.count, self.rank = world()
        self._joined = False
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            self._joined = True
        self._device = "cuda" if self.count > 1 and dist.get_backend() == "nccl" else "cpu"

    def share(self, items: int) -> list[int]:
        """The items of a walk that this process runs: consecutive ones, as even as can be."""
        first, stop = self.rank * items // self.count, (self.rank + 1) * items // self.count
        return list(range(first, stop))

    def exchange(self, values: list[float], mine: list[int]) -> list[float]:
        """All processes' values, each from the one that has it."""
        if self.count == 1:
            return values
        own = torch.zeros(len(values), dtype=torch.float64, device=self._device)
        own[mine] = torch.tensor([values[i] for i in mine], dtype=torch.float64, device=self._device)
        dist.all_reduce(own)  # one of the summands is the value, the others are zero: exact
        return [float(value) for value in own.tolist()]

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, device=self._device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        return int(shared.item())

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        if self._joined:
            dist.destroy_process_group()
