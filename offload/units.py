"""Cut a model into units: the pieces that move as one, found by structure alone.

Every entry of the outermost `ModuleList`s is a unit (the repeated blocks), the input embedding and the output embedding
are units, and so is any other single large layer. What is left (final norms, position tables, small heads) forms one
*resident* unit that stays on the device. A unit's *boundary modules* are those whose `forward` the engine intercepts:
a tied embedding has two, `embed_tokens` and `lm_head`, around one set of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from offload.errors import OffloadError
from offload.layout import UnitLayout, pack

# A single layer outside the blocks becomes a unit of its own when it has more than this share of the largest block.
LARGE_SHARE = 0.5
_SINGLE_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@dataclass
class Unit:
    """One unit: its boundary modules, its parameters in the order of its layout, and what kind of piece it is."""

    index: int
    name: str
    kind: str  # embedding | block | head | other | resident
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    layout: UnitLayout

    @property
    def resident(self) -> bool:
        return self.kind == "resident"

    @property
    def held(self) -> bool:
        """Used at several places of one forward, so its gradient buffer lives through the whole backward."""
        return len(self.modules) > 1

    @property
    def trainable(self) -> bool:
        return self.layout.trainable_elements > 0


def find_units(model: nn.Module) -> list[Unit]:
    """Discover the units of `model` (parameters may be on meta), in the order in which a forward visits them.

    The resident unit, if any parameter is left over, comes last. Raises `OffloadError` for a model without parameters.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    if not names:
        raise OffloadError(f"{type(model).__name__} has no parameters: there is nothing to stream")
    module_names = {id(m): n for n, m in model.named_modules()}
    owners: dict[int, list[nn.Module]] = {}  # parameter -> the modules that hold it directly
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(module)

    blocks = _blocks(model)
    inside = {id(m): b for b in blocks for m in b.modules()}
    largest = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0)
    singles = _single_layers(model, inside, owners, largest)
    groups = _merge_tied(singles)

    order = {id(m): i for i, m in enumerate(model.modules())}
    head = output_embeddings(model)
    embedding = _call(model, "get_input_embeddings")
    found: list[tuple[float, str, list[nn.Module]]] = [(order[id(b)], "block", [b]) for b in blocks]
    for group in groups:
        kind = (
            "embedding" if any(m is embedding for m in group) else "head" if any(m is head for m in group) else "other"
        )
        position = -1.0 if kind == "embedding" else float("inf") if kind == "head" else order[id(group[0])]
        found.append((position, kind, group))
    found.sort(key=lambda entry: entry[0])

    boundary_of: dict[int, set[int]] = {}
    for i, (_, _, modules) in enumerate(found):
        for m in (m for top in modules for m in top.modules()):
            boundary_of.setdefault(id(m), set()).add(i)
    members: list[list[nn.Parameter]] = [[] for _ in found]
    leftover: list[nn.Parameter] = []
    for p in model.parameters():
        homes = [boundary_of.get(id(m), set()) for m in owners[id(p)]]
        everywhere = set().union(*homes)
        # What is used outside of any unit, or in several, stays on the device.
        alone = len(everywhere) == 1 and all(homes)
        (members[everywhere.pop()] if alone else leftover).append(p)

    units: list[Unit] = []
    for (_, kind, modules), parameters in zip(found, members, strict=True):
        if parameters:
            units.append(_unit(len(units), module_names[id(modules[0])], kind, modules, parameters, names))
    if leftover:
        units.append(_unit(len(units), "resident", "resident", [], leftover, names))
    return units


def _unit(
    index: int, name: str, kind: str, modules: list[nn.Module], parameters: list[nn.Parameter], names: dict[int, str]
) -> Unit:
    layout = pack(index, name, [(names[id(p)], tuple(p.shape), p.requires_grad) for p in parameters])
    return Unit(index, name, kind, modules, parameters, layout)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Entries of the outermost ModuleLists that have parameters and a forward of their own, each once."""
    blocks: list[nn.Module] = []
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in seen:
            entries = [m for m in module if next(m.parameters(), None) is not None]
            if entries and all(_has_forward(m) for m in entries):
                blocks += [m for m in entries if id(m) not in seen]
                seen.update(id(m) for entry in entries for m in entry.modules())
    return blocks


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _single_layers(
    model: nn.Module, inside: dict[int, nn.Module], owners: dict[int, list[nn.Module]], largest: int
) -> list[nn.Module]:
    """Layers outside the blocks that are units: the embeddings, what is tied to them, and other large single layers."""
    wanted = [_call(model, "get_input_embeddings"), output_embeddings(model)]
    chosen: list[nn.Module] = []
    for module in wanted:
        if isinstance(module, nn.Module) and id(module) not in inside and all(module is not m for m in chosen):
            chosen.append(module)
    taken = {id(p) for m in chosen for p in m.parameters()}
    within = {id(m) for top in chosen for m in top.modules()}
    for module in model.modules():
        if id(module) in inside or id(module) in within or not isinstance(module, _SINGLE_LAYERS):
            continue
        if isinstance(module, NonDynamicallyQuantizableLinear):
            continue  # inside nn.MultiheadAttention, which uses its weight without calling it
        direct = [p for p in module._parameters.values() if p is not None]
        tied = any(id(p) in taken for p in direct)
        large = largest > 0 and sum(p.numel() for p in direct) > LARGE_SHARE * largest
        if direct and (tied or large):
            chosen.append(module)
    return chosen


def _merge_tied(modules: list[nn.Module]) -> list[list[nn.Module]]:
    """Group modules that share a parameter; the order within a group and of groups is that of first appearance."""
    groups: list[list[nn.Module]] = []
    for module in modules:
        mine = {id(p) for p in module.parameters()}
        joined = [g for g in groups if any(id(p) in mine for m in g for p in m.parameters())]
        merged = [m for g in joined for m in g] + [module]
        groups = [g for g in groups if all(g is not j for j in joined)] + [merged]
    return groups


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that computes the model's logits over its vocabulary, None where it has none."""
    return _call(model, "get_output_embeddings")


def _call(model: nn.Module, method: str) -> nn.Module | None:
    """`get_input_embeddings` or `get_output_embeddings`; None where a model has no such thing (vision, speech)."""
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) and next(found.parameters(), None) is not None else None
