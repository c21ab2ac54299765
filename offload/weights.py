"""Where a model's weights come from: a checkpoint, random numbers, or a model already in memory.

Every source is a `TensorSource`: the reader pulls slices of parameters by name, so that no more than a slice (or, where
a parameter has to be converted or drawn, that parameter) is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from offload.checkpoint_source import CheckpointSource
from offload.errors import WeightsError
from offload.export import save_pretrained
from offload.random_init import RandomSource

__all__ = [
    "CheckpointSource",
    "LoadedSource",
    "RandomSource",
    "TensorSource",
    "load_buffers",
    "open_weights",
    "save_pretrained",
]


class TensorSource(Protocol):
    """Gives slices of a model's parameters by the names of `model.named_parameters()`."""

    @property
    def order(self) -> list[str]:
        """Parameter names in the order in which reading is cheapest."""
        ...

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened parameter: 1-D, on the CPU, in the source's dtype."""
        ...

    def close(self) -> None:
        """Let go of files and memory."""
        ...


class LoadedSource:
    """The weights of a model that is already in memory. Values are views: later changes of the model show."""

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        """`names`: only these parameters (default: all). Raises WeightsError naming one without memory."""
        every = dict(model.named_parameters())
        self._parameters = every if names is None else {name: every[name] for name in names}
        for name, p in self._parameters.items():
            if p.is_meta:
                raise WeightsError(
                    f"{name} is on the meta device and has no values; load the model's weights before wrapping it, or "
                    "let model.path name the directory of its checkpoint"
                )

    @property
    def order(self) -> list[str]:
        """Parameter names in the order of the model; released ones are left out."""
        return list(self._parameters)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a parameter: 1-D, on the CPU, in the parameter's dtype."""
        return self._parameters[name].detach().reshape(-1)[start : start + count].cpu()

    def release(self, name: str) -> None:
        """Free a parameter's memory: of its shape one element, seen everywhere, is left. It cannot be read again."""
        p = self._parameters.pop(name)
        p.data = p.new_zeros(()).expand(p.shape)

    def close(self) -> None:
        self._parameters.clear()


class _Joined:
    """Several sources as one, each for its own parameters."""

    def __init__(self, sources: dict[str, TensorSource]) -> None:
        self._sources = sources  # by parameter

    @property
    def order(self) -> list[str]:
        names: dict[str, None] = {}
        for source in self._sources.values():
            names.update((name, None) for name in source.order if self._sources.get(name) is source)
        return [*names, *(name for name in self._sources if name not in names)]

    def read(self, name: str, start: int, count: int) -> Tensor:
        return self._sources[name].read(name, start, count)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


def open_weights(model: nn.Module, directory: str | Path | None = None, seed: int = 0) -> TensorSource:
    """The weights a run begins with: parameters that have memory from there, those on meta from elsewhere.

    So a peft adapter made around a model on meta works: the adapter is taken from memory, the base streamed.

    Args:
        directory: the checkpoint for parameters on meta; None draws them at random.
        seed: of the random numbers.
    Raises WeightsError.
    """
    in_memory = {name for name, p in model.named_parameters() if not p.is_meta}
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if not on_meta:
        return LoadedSource(model)
    streamed = CheckpointSource(directory, model) if directory is not None else RandomSource(model, seed)
    known = set(streamed.names)
    for name in on_meta:
        if name not in known:
            streamed.close()
            raise WeightsError(
                f"{name} is on the meta device and belongs to an adapter, which no checkpoint of the base model has; "
                "offload.models.prepare_for_training gives plain LoRA adapters their first values"
            )
    if not in_memory:
        return streamed
    loaded = LoadedSource(model, in_memory)
    return _Joined({name: loaded if name in in_memory else streamed for name, _ in model.named_parameters()})


def load_buffers(directory: str | Path, model: nn.Module) -> None:
    """Copy the persistent buffers that a checkpoint has into the model's own, in their dtype. Raises WeightsError."""
    source = CheckpointSource(directory, model)
    try:
        source.load_buffers()
    finally:
        source.close()
