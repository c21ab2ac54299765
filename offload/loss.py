"""What a micro-batch's loss counts for in the global batch, and the numbers a step is reproduced from.

`N` is the number of counted targets of the global batch. When all micro-batches count the same number, each loss is
divided by M, as in plain accumulation. Otherwise a model whose loss function takes `num_items_in_batch` is given N, and
any other model's loss is weighted by its own count over N.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from offload.errors import OffloadError

_MASK64 = 2**64 - 1


def micro_seed(seed: int, step: int, i: int) -> int:
    """The seed of micro-batch `i` (from 0) of step `step` (from 0) of a run with `train.seed` = `seed`.

    Each micro-batch's forward starts at `torch.manual_seed(micro_seed(...))`: units run all micro-batches before the
    next unit begins, so one common stream would give dropout other numbers than plain accumulation. The mixing is
    SplitMix64's finalizer (Steele, Lea, Flood 2014); the result is a non-negative 63-bit integer.
    """
    value = seed & _MASK64
    for word in (step, i):
        value = (value + 0x9E3779B97F4A7C15 * (word + 1)) & _MASK64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
        value ^= value >> 31
    return value >> 1


def split(batch: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """Cut dimension 0 of every tensor of a global batch into micro-batches of `rows` rows, in order.

    Values that are not tensors go to every micro-batch. Raises OffloadError if tensors disagree about the rows.
    """
    sizes = {name: value.shape[0] for name, value in batch.items() if torch.is_tensor(value) and value.dim() > 0}
    if not sizes:
        raise OffloadError("the batch holds no tensor; give a dict of tensors, one global batch")
    if all(size <= rows for size in sizes.values()):
        return [dict(batch)]  # one micro-batch: rows need not agree (images of a vision-language batch)
    total = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size != total:
            raise OffloadError(
                f"batch[{name!r}] has {size} rows where batch[{next(iter(sizes))!r}] has {total}; dimension 0 of every "
                "tensor is the global batch"
            )
    return [
        {n: v[at : at + rows] if torch.is_tensor(v) and v.dim() > 0 else v for n, v in batch.items()}
        for at in range(0, total, rows)
    ]


@dataclass(frozen=True)
class Scale:
    """How one micro-batch's loss becomes its share of the global batch's loss."""

    count: int  # its counted targets
    total: int  # N
    micro_batches: int
    equal: bool  # all micro-batches count the same number

    def apply(self, loss: Tensor, given_total: bool) -> Tensor:
        """The scaled loss; `given_total` says that the model's loss function has divided by N already."""
        if self.equal:
            return loss / self.micro_batches
        return loss if given_total else loss * (self.count / self.total)


class LossItems:
    """Knows how a model's loss counts, and sees whether its loss function was given `num_items_in_batch`."""

    def __init__(self, model: nn.Module) -> None:
        get_base = getattr(model, "get_base_model", None)  # peft
        self._base = get_base() if callable(get_base) else model
        self._loss_function = getattr(self._base, "loss_function", None)
        self._owned = "_loss_function" in vars(self._base)
        parameters = inspect.signature(self._base.forward).parameters.values()
        forwards = any(p.kind is p.VAR_KEYWORD or p.name == "num_items_in_batch" for p in parameters)
        self._takes_total = forwards and _takes_items(self._loss_function)
        if self._takes_total:
            self._base.loss_function = self._watch(self._loss_function)

    def close(self) -> None:
        """Give the model its own loss function back."""
        if self._takes_total:
            if self._owned:
                self._base._loss_function = self._loss_function
            else:
                del self._base._loss_function
            self._takes_total = False

    def scales(self, micro_batches: list[dict[str, Any]]) -> list[Scale]:
        """The scale of each micro-batch of one global batch."""
        counts = [self._count(micro) for micro in micro_batches]
        total, equal = sum(counts), len(set(counts)) == 1
        return [Scale(count, total, len(counts), equal) for count in counts]

    def forward(self, model: nn.Module, micro: dict[str, Any], scale: Scale) -> Tensor:
        """Run the model on one micro-batch and return its scaled loss. Raises OffloadError when there is no loss."""
        inputs = dict(micro)
        give = self._takes_total and not scale.equal and "num_items_in_batch" not in inputs
        if give:
            inputs["num_items_in_batch"] = scale.total
        me: Any = getcurrent()
        me.loss_was_given_total = False
        output = model(**inputs)
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = output[0] if isinstance(output, tuple) and output and output[0].dim() == 0 else None
        if loss is None:
            raise OffloadError(
                f"{type(model).__name__} returned no loss for a batch with {sorted(micro)}; give it `labels`"
            )
        return scale.apply(loss, me.loss_was_given_total)

    def _count(self, micro: dict[str, Any]) -> int:
        labels = micro.get("labels")
        if torch.is_tensor(micro.get("shift_labels")):
            return int((micro["shift_labels"] != -100).sum())
        if not torch.is_tensor(labels) or labels.dim() < 2 or labels.is_floating_point():
            first = labels if torch.is_tensor(labels) else next(v for v in micro.values() if torch.is_tensor(v))
            return int(first.shape[0])
        encoder_decoder = getattr(getattr(self._base, "config", None), "is_encoder_decoder", False)
        shifted = self._loss_function is ForCausalLMLoss and not encoder_decoder
        return int(((labels[..., 1:] if shifted else labels) != -100).sum())

    def _watch(self, loss_function: Any) -> Any:
        @functools.wraps(loss_function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("num_items_in_batch") is not None:
                getcurrent().loss_was_given_total = True
            return loss_function(*args, **kwargs)

        return watched


def _takes_items(loss_function: Any) -> bool:
    return loss_function is not None and "num_items_in_batch" in inspect.signature(loss_function).parameters
