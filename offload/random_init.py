"""A fresh model's weights, generated piece by piece, equal to the bit to those of a model made in memory.

The model's class is instantiated once, without memory, with its initialisation noted instead of executed
(`offload.deferred_init`); values are worked out when they are read. A model whose constructor asks on which device its
own parameters are takes another path there: its weights are as valid, but may not be those of the model made in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from offload.deferred_init import DeferredInit, whole_functions_deferred
from offload.errors import WeightsError
from offload.models import parameters_as
from offload.names import base_model_of, base_tensors


class RandomSource:
    """The weights that `torch.manual_seed(seed); type(model)._from_config(model.config)` has in float32, streamed.

    Asking in the order of `order`, and for each parameter from its beginning to its end, takes least time and memory: a
    few MB, except for the few initialisers that need their whole tensor (truncated normal, orthogonal).
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        """`model`: a transformers model, or a peft model around one (without the adapters, which peft initialises).

        Raises WeightsError when the model is not what its configuration makes (resized, say).
        """
        self._mode = DeferredInit(seed)
        base = base_model_of(model)
        config = copy.deepcopy(base.config)
        with parameters_as(self._mode.adopt), whole_functions_deferred(self._mode), self._mode:
            fresh = dict(type(base)._from_config(config, dtype=torch.float32).named_parameters(remove_duplicate=False))
        own = {id(p): name for name, p in model.named_parameters()}
        self._parameters: dict[str, nn.Parameter] = {}
        for t in base_tensors(model):
            if not t.is_parameter or own[id(t.tensor)] in self._parameters:
                continue
            made = fresh.get(t.base_name)
            if made is None or made.shape != t.tensor.shape:
                raise WeightsError(
                    f"{t.name} has shape {tuple(t.tensor.shape)}, but a {type(base).__name__} made from its "
                    f"configuration has {'no such parameter' if made is None else tuple(made.shape)}; random weights "
                    "are only for models as their configuration describes them"
                )
            self._parameters[own[id(t.tensor)]] = made
        self._streams: dict[str, _Stream] = {}

    @property
    def names(self) -> list[str]:
        """Parameters that can be read: all but those of adapters."""
        return list(self._parameters)

    @property
    def order(self) -> list[str]:
        """Parameter names in the order in which their values are drawn."""
        deferred = self._mode.is_deferred
        return sorted(self._parameters, key=lambda n: self._mode.place(p) if deferred(p := self._parameters[n]) else -1)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a parameter: 1-D, float32, on the CPU."""
        stream = self._streams.get(name)
        if stream is None or stream.start > start:
            stream = self._streams[name] = self._open(self._parameters[name].detach())
        values = stream.take(start, count)
        if start + count >= self._parameters[name].numel():
            del self._streams[name]
        return values

    def close(self) -> None:
        self._streams.clear()

    def _open(self, p: Tensor) -> _Stream:
        return _Stream(self._mode.blocks(p) if self._mode.is_deferred(p) else iter([p.reshape(-1)]))


class _Stream:
    """Consecutive blocks of elements, of which only the latest is kept; `start` is its first element."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self._blocks = blocks
        self._block = torch.empty(0)
        self.start = 0

    def take(self, start: int, count: int) -> Tensor:
        """Elements [start, start + count); what lies before is gone when the blocks have moved on."""
        parts: list[Tensor] = []
        while count:
            offset = start - self.start
            if offset >= self._block.numel():
                self.start += self._block.numel()
                self._block = torch.empty(0)  # before the next is made
                self._block = next(self._blocks)
                continue
            parts.append(self._block[offset : offset + count])
            start, count = start + parts[-1].numel(), count - parts[-1].numel()
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self._block[:0]
