"""Which tensor of a wrapped (peft) model is which tensor of the model underneath, as checkpoints name it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from offload.errors import WeightsError


@dataclass(frozen=True)
class BaseTensor:
    """A parameter or persistent buffer that a checkpoint of the base model holds under `base_name`."""

    name: str  # in the model
    base_name: str
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, or the one a peft model wraps. Raises WeightsError for anything else."""
    base = model.get_base_model() if is_peft(model) else model  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel):
        raise WeightsError(f"{type(model).__name__} is neither a transformers model nor a peft model around one")
    return base


def is_peft(model: nn.Module) -> bool:
    """Whether this is a `PeftModel`."""
    peft = sys.modules.get("peft")  # not imported: then there is no such model
    return peft is not None and isinstance(model, peft.PeftModel)


def base_tensors(model: nn.Module) -> list[BaseTensor]:
    """All parameters and persistent buffers but those that adapters add; tied ones under each of their names."""
    base = base_model_of(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    return list(_walk(base, f"{prefix}." if prefix else "", ""))


def _walk(module: nn.Module, path: str, base_path: str) -> Iterator[BaseTensor]:
    inner = _wrapped(module)
    if inner is None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield BaseTensor(path + name, base_path + name, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield BaseTensor(path + name, base_path + name, buffer)
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{path}{name}.", f"{base_path}{name}.")
    for inner_path in inner or ():
        # The module that was wrapped, and trainable copies of it, stand where the wrapper stands.
        yield from _walk(module.get_submodule(inner_path), f"{path}{inner_path}.", base_path)


def _wrapped(module: nn.Module) -> list[str] | None:
    """Paths below a peft wrapper to what it wraps; None if the module is no wrapper."""
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return None
    if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and "base_layer" in module._modules:
        return ["base_layer"]
    if isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
        copies = module._modules.get("modules_to_save")
        names = copies._modules if copies is not None else {}
        return ["original_module", *(f"modules_to_save.{name}" for name in names)]
    return None
