"""TensorBoard and Weights & Biases, through their own packages, with the metric names of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from offload.config import Config
from offload.rundir import RunDirectory


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `<run>/tensorboard`."""

    def __init__(self, run: RunDirectory, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps that were not committed, and will be taken again, are hidden by purge_step.
        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A wandb run with this run's id, so that a resumed run goes on in the same one."""

    def __init__(self, run: RunDirectory, cfg: Config) -> None:
        import wandb

        self._run: Any = wandb.init(id=run.id, resume="allow", dir=str(run.path), config=cfg.dump())

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(cfg: Config, run: RunDirectory, completed: int) -> list[Tracker]:
    """The trackers that `train.report_to` names, for steps after `completed`."""
    trackers: list[Tracker] = []
    if "tensorboard" in cfg.train.report_to:
        trackers.append(TensorBoard(run, completed + 1))
    if "wandb" in cfg.train.report_to:
        trackers.append(WeightsAndBiases(run, cfg))
    return trackers


def train_values(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of metrics.jsonl under the Trainer's names."""
    names = {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "lr": "train/learning_rate",
        "tokens_per_second": "train/tokens_per_second",
    }
    return {name: float(row[key]) for key, name in names.items() if row.get(key) is not None}
