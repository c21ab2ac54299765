"""First values for peft adapters that were put around a model on meta: peft leaves those on meta too."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from offload.errors import WeightsError

# Initialisations that need nothing of the base weights.
_INDEPENDENT = (True, "gaussian")


def initialise_adapters(model: nn.Module) -> None:
    """Give LoRA adapters without memory the values peft gives them on a model in memory (from torch's generator).

    Adapters that have memory are left alone. Raises WeightsError for kinds whose first values depend on the base
    weights, which are not there.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            continue
        own = [child for key, child in layer._modules.items() if child is not None and key != "base_layer"]
        empty = [child for child in own if any(p.is_meta for p in child.parameters())]
        if not empty:
            continue
        if not isinstance(layer, peft.tuners.lora.LoraLayer) or any(layer.use_dora.values()):
            raise WeightsError(f"{name}: only plain LoRA can be made around a model on meta; load the base model first")
        for child in empty:
            child.to_empty(device="cpu")
        for adapter in layer.r:  # rank by adapter
            how = model.peft_config[adapter].init_lora_weights  # type: ignore[union-attr, index]
            if how not in _INDEPENDENT:
                raise WeightsError(
                    f"{name}: init_lora_weights={how!r} makes the adapter from the base weights, which are on meta; "
                    "load the base model first, or use init_lora_weights=True"
                )
            layer.reset_lora_parameters(adapter, how)
