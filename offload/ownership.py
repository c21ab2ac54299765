"""An engine owns its model from start to end: parameters without memory, buffers on the device, no copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from offload.errors import OffloadError
from offload.units import Unit


def take_ownership(model: nn.Module, units: list[Unit], device: str, stack: ExitStack) -> None:
    """Make meta parameters bindable, bring buffers to the device, forbid copies; `stack` undoes it, leaving the
    parameters on meta."""
    _replace_parameters(model, units, lambda p: p if not p.is_meta else _unbound(p))
    _move_buffers(model, device)
    stack.callback(_move_buffers, model, "cpu")

    def refuse(memo: object) -> None:
        raise OffloadError(
            f"{type(model).__name__} belongs to an offload engine, which holds its weights: save_pretrained it instead "
            "of copying it"
        )

    modules = list(model.modules())
    for module in modules:
        module.__dict__["__deepcopy__"] = refuse
    model.__dict__["offload_engine"] = True

    def give_back() -> None:
        for module in modules:
            del module.__dict__["__deepcopy__"]
        del model.__dict__["offload_engine"]
        _replace_parameters(model, units, lambda p: nn.Parameter(_on_meta(p), requires_grad=p.requires_grad))

    stack.callback(give_back)


def _move_buffers(model: nn.Module, device: str) -> None:
    """Buffers belong to no unit: they stay on the device. Shared ones stay shared."""
    moved: dict[int, Tensor] = {}
    originals = []
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is not None and b.device.type != device:
                originals.append(b)  # keeps the id from being used again
                module._buffers[name] = moved.setdefault(id(b), b.to(device))


def _unbound(p: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(torch.empty(1, dtype=p.dtype).expand(p.shape), requires_grad=p.requires_grad)
    made.__dict__.update(p.__dict__)
    return made


def _on_meta(p: nn.Parameter) -> Tensor:
    return torch.empty(p.shape, dtype=p.dtype, device="meta")


def _replace_parameters(model: nn.Module, units: list[Unit], make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter by `make(parameter)`, ties kept, in the modules and in the units' lists."""
    made: dict[int, nn.Parameter] = {}
    originals = []
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = make(p)
                    originals.append(p)  # keeps the id from being used again
                module._parameters[name] = made[id(p)]
    for unit in units:
        unit.parameters = [made[id(p)] for p in unit.parameters]
