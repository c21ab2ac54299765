"""How checkpoint tensors become a model's parameters and back; what is private of transformers' conversions is here.

transformers renames and converts while loading and saving (`core_model_loading`, `conversion_mapping`): legacy names,
prefixes of base models, experts stored one by one and fused in the module. Its own rules are used here, on names and
shapes, so that the bytes can be streamed. Checked against the versions in `TESTED_VERSIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from offload.errors import WeightsError

TESTED_VERSIONS = ("5.23.0",)


@dataclass
class Conversion:
    """Tensors that are converted together, and how; `sources` are (pattern of the rule, name) in the rule's order."""

    rule: WeightConverter
    first_target: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    renamings: list[WeightRenaming] = field(default_factory=list)  # to apply to the names of the results

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The results by name. `read` gives a whole source tensor; on meta it gives the results' shapes."""
        rule = deepcopy(self.rule)
        for pattern, name in self.sources:
            rule.add_tensor(self.first_target, name, pattern, partial(read, name))  # type: ignore[arg-type]
        try:
            results = rule.convert(self.first_target, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            names = ", ".join(name for _, name in self.sources[:3])
            raise WeightsError(
                f"{self.first_target} cannot be made from {len(self.sources)} stored tensors ({names}, ...): {error}; "
                "their number or shapes do not belong to this configuration"
            ) from error
        return {
            _renamed(name, self.renamings): value[0] if isinstance(value, list) else value
            for name, value in results.items()
        }


@dataclass
class LoadRules:
    """What each tensor of a checkpoint is for."""

    direct: dict[str, str] = field(default_factory=dict)  # parameter or buffer -> tensor
    conversions: list[Conversion] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)  # (tensor, its name today)
    clashes: list[tuple[str, str, str]] = field(default_factory=list)  # (parameter, tensor, other tensor)


@dataclass
class SaveRules:
    """How a model's tensors are written in the format checkpoints of its architecture have."""

    direct: dict[str, str] = field(default_factory=dict)  # name in the file -> name in the model
    conversions: list[Conversion] = field(default_factory=list)


def load_rules(model: PreTrainedModel, expected: Mapping[str, Tensor], names: list[str]) -> LoadRules:
    """Sort the checkpoint's tensors, as `convert_and_load_state_dict_in_model` does.

    Args:
        expected: the model's `state_dict`, on meta or not.
        names: of all tensors in the checkpoint.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, targets = model.base_model_prefix, dict(expected)
    rules = LoadRules()
    groups: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=targets)
        if target not in targets:
            rules.unexpected.append((name, target))
        elif pattern is not None:
            groups.setdefault(target, Conversion(by_pattern[pattern], target)).sources.append((pattern, name))
        elif target in rules.direct:
            rules.clashes.append((target, rules.direct[target], name))
        else:
            rules.direct[target] = name
    rules.conversions = list(groups.values())
    return rules


def save_rules(model: PreTrainedModel, names: list[str]) -> SaveRules:
    """How to write a model's tensors, as `revert_weight_conversion` does.

    Args:
        names: of the tensors to write, tied ones once.
    """
    mapping = getattr(model, "_weight_conversions", None)  # those `from_pretrained` used
    if mapping is None:
        # Without having loaded a checkpoint nothing says whether a removed prefix was there.
        mapping = [r for r in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(r, PrefixChange)]
    reverse = [rule.reverse_transform() for rule in mapping[::-1]]
    renamings = [rule for rule in reverse if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    rules = SaveRules()
    groups: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, [], converters)
        if pattern is None:
            rules.direct[_renamed(name, renamings)] = name
        else:
            group = groups.setdefault(target, Conversion(by_pattern[pattern], target, renamings=renamings))
            group.sources.append((pattern, name))
    rules.conversions = list(groups.values())
    return rules


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    # 5.23 has a function for this alone, 5.17 has not.
    renamed: str = rename_source_key(name, renamings, [])[0]
    return renamed


def ignorable_missing(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a checkpoint may lack a parameter or buffer: the model makes it itself."""
    return _matcher(set(model._keys_to_ignore_on_load_missing or ()))


def ignorable_unexpected(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a checkpoint may have a tensor the model does not, as `_adjust_missing_and_unexpected_keys` sees it."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Old checkpoints carry these buffers where today's modules have them elsewhere or do not save them.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return _matcher(patterns)


def not_saved(model: PreTrainedModel) -> set[str]:
    """Names the model leaves out of checkpoints."""
    return set(model._keys_to_ignore_on_save or ())


def declared_ties(model: nn.Module) -> Callable[[str], bool]:
    """Whether a tied name is the one that is not saved (`lm_head.weight` rather than the embedding's)."""
    patterns: set[str] = set()
    for prefix, module in model.named_modules():
        for pattern in getattr(module, "_tied_weights_keys", None) or {}:
            patterns.add(f"{prefix}.{pattern}" if prefix else pattern)
    return _matcher(patterns)


def _matcher(patterns: set[Any]) -> Callable[[str], bool]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)
