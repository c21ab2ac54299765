"""Several processes on one zeroth-order step: each runs some of the forward passes, and all learn all losses.

Perturbation and data parallelism after DistZO2, in one rule: the (branch, micro-batch) pairs of a walk are dealt out in
order. With two processes one has the plus and one the minus branch; with more, branches are split by micro-batches.
Every process keeps all weights and applies every update, from the same scalars: nothing else is sent, and no number
depends on how many processes there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from offload.config import Config
from offload.errors import ConfigError, OffloadError
from offload.zo_log import decode, encode
from offload.zo_variants import Update


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
        self._asked: Callable[[], bool] = lambda: False
        self._ends = False

    def share(self, items: int) -> list[int]:
        """The items of a walk that this process runs: consecutive ones, as even as can be."""
        first, stop = self.rank * items // self.count, (self.rank + 1) * items // self.count
        return list(range(first, stop))

    def exchange(self, values: list[float], mine: list[int]) -> list[float]:
        """All processes' values, each from the one that has it; and whether one of them was asked to stop."""
        if self.count == 1:
            return values
        own = torch.zeros(len(values) + 1, dtype=torch.float64, device=self._device)
        own[mine] = torch.tensor([values[i] for i in mine], dtype=torch.float64, device=self._device)
        own[-1] = float(self._asked())
        dist.all_reduce(own)  # one of the summands is the value, the others are zero: exact
        *found, asked = own.tolist()
        self._ends = asked > 0
        return [float(value) for value in found]

    def agreed(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """`asked`, of whichever process, as all of them knew it at their last exchange: one that left by itself would
        leave the others waiting for its losses."""
        if self.count == 1:
            return asked
        self._asked = asked
        return lambda: self._ends

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of their ranks; plain data."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        if self._joined:
            dist.destroy_process_group()


def check_settings(processes: Processes, cfg: Config) -> None:
    """Raises ConfigError where processes would take different steps: each has measured its own machine, and may have
    come to another micro-batch size where that is to be chosen."""
    dumped = cfg.dump()
    every = processes.gather({"train": dumped["train"], "zo": dumped.get("zo")})
    for rank, other in enumerate(every):
        for section, key in ((s, k) for s in ("train", "zo") for k in other[s] or {}):
            if other[section][key] != every[0][section][key]:
                raise ConfigError(
                    f"{section}.{key}: got {every[0][section][key]!r} in the first process and {other[section][key]!r} "
                    f"in process {rank}; accepted: one value for all, written out in the config"
                )


def common_log(processes: Processes, own: list[Update], committed: int, replays: bool) -> list[Update]:
    """The updates that all processes go on after; one that has fewer in its own log takes them from another's.

    Processes differ after a kill between two of them, and where a run goes on with more processes than it had: the new
    ones begin with the first weights, and make the others' steps again from the log.

    Args:
        own: this process's log, as far as it can be gone on after. committed: the step of its store.
        replays: whether steps can be made again from the log.
    """
    lines = [json.dumps(encode(update)) for update in own]  # as text, in which what is no number equals itself
    every: list[tuple[int, bool, list[str]]] = processes.gather((committed, replays, lines))
    last = max(len(every[0][2]), *(step for step, _, _ in every))
    longest = next(log for _, _, log in every if len(log) >= last)[:last]
    for rank, (stands_at, can, log) in enumerate(every):
        if log[:last] != longest[: len(log)]:
            raise OffloadError(
                f"process {rank} has the log of another run than the first one; remove its run directory (the one that "
                f"ends in -rank{rank}), and it makes the first one's steps again"
            )
        if stands_at != last and not can:
            raise OffloadError(
                f"process {rank} stands at step {stands_at} and another at {last}, and the steps of a model that "
                "changes its own buffers cannot be made again from the log; go on with one process"
            )
    return [decode(json.loads(line)) for line in longest]
