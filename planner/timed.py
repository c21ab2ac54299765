"""Seconds of one real forward and backward of every distinct unit at the run's own shapes, with random weights.

A rate of matrix products says little about a unit of small products, norms and attention. So the model's own forward
is run once more as the profile runs it, on real tensors: each unit that cannot be told from one timed before is given
random weights, run, and its weights dropped; the units between are passed over. Cached per machine.
"""

from __future__ import annotations

import contextvars
import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
import torch.utils._pytree as pytree
from offload.planner import unit_times
from offload.planner.bounds import UnitModules
from offload.planner.plan import Hardware, Profile, UnitCost
from offload.planner.profile import default_batch, empty_copy
from offload.planner.tracer import (
    Tracer,
    backward,
    boundaries,
    detach,
    loss_of,
    owners_of,
    template,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

LONGEST = 6.0  # seconds: a unit whose forward and backward are expected to take longer is not timed
# Repetitions of a pass: the first compiles kernels and faults memory in, of the others the median counts, because on a
# shared machine the fastest is what steps are not. Short passes are repeated until so many seconds are over.
REPEATS, MOST_REPEATS = 4, 9
SECONDS = 1.0
ALL_VISITS = 1_000_000_000  # parameters of a model of which every unit may be run, where one kind each is not enough


def timed(
    profile: Profile,
    model: nn.Module,
    units: Sequence[UnitModules],
    hardware: Hardware,
    *,
    micro_batch: int,
    sequence_length: int,
    dtype: torch.dtype,
    device: str,
    budget: int | None = None,
    backward: bool = True,
    refresh: bool = False,
) -> Profile:
    """`profile` with measured seconds of the units that can be timed within `LONGEST`, a quarter of the free memory and
    `budget`: bytes of the device's memory that the run may take, so that nothing before it takes more.

    Without `backward` the backward seconds are those of the loss alone.
    The model, on meta or not, is not touched. What is not run keeps the estimate from its operations, with a note.
    """
    rate = hardware.matrix_rate(str(dtype).removeprefix("torch."))
    room = (hardware.cpu_bytes if device == "cpu" else hardware.gpu_bytes) // 4
    room = room if budget is None else min(room, budget)
    costs = profile.costs
    large = [
        name
        for name, _, modules in units
        if 4 * costs[name].forward_flops / rate > LONGEST
        or _bytes_to_time(costs[name], modules, profile, dtype) > room
    ]
    if large:
        told = large[0] if len(large) == 1 else f"{large[0]} and {len(large) - 1} more"
        note = f"times: too large to be timed at start-up and estimated from operations: {told}"
        profile = replace(profile, notes=(*profile.notes, note))
    if all(name in large or not costs[name].visits for name, _, _ in units):
        return profile
    # the loss follows the last visit, and is not there without it
    visits = sum(cost.visits for cost in costs.values())
    stop = visits - 1 if any(costs[name].kept for name in large) else visits
    key = unit_times.key_of(model, units, micro_batch, sequence_length, dtype, device, backward, large)
    found = None if refresh else unit_times.load(key)
    if found is None:
        whole = sum(p.numel() for p in model.parameters()) <= ALL_VISITS
        for collects in (False, True) if whole else (False,):
            try:
                found = _measure(
                    model, units, micro_batch, sequence_length, dtype, device, backward, collects, large, stop
                )
                break
            except Exception as error:  # a model's own code on random weights may raise anything; a plan is wanted
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if found is None:
            return replace(profile, notes=(*profile.notes, f"times: estimated from operations ({reason})"))
        gc.collect()  # of the copy's modules, whose patched forwards refer to them
        unit_times.save(key, found)
    costs = {
        name: replace(cost, forward_seconds=found[name][0], backward_seconds=found[name][1]) if name in found else cost
        for name, cost in costs.items()
    }
    return replace(profile, costs=costs)


def _bytes_to_time(cost: UnitCost, modules: Sequence[nn.Module], profile: Profile, dtype: torch.dtype) -> int:
    """The most that timing one unit takes: its weights and its backward (gradients included) beside what goes in, what
    came out and a gradient of that. The last one also runs with the model's own loss: on whole logits, with three
    copies of them in float32."""
    weights = sum(p.numel() * dtype.itemsize for m in modules[:1] for p in m.parameters())
    if not cost.kept:
        return weights + cost.workspace_backward + 3 * cost.boundary_bytes
    logits = profile.logits_bytes
    return 2 * weights + max(3 * logits, cost.workspace_backward + 3 * logits * 4 // dtype.itemsize)


_Place = tuple[nn.Module, str]


class _Enough(Exception):
    """Ends a forward of which the rest is not to be run."""


@dataclass
class _Seconds:
    """Stands where the profile counts bytes."""

    flops: int = 0
    live: int = 0
    begin: float = 0.0

    def mark(self) -> int:
        self.begin = time.perf_counter()
        return 0


@dataclass
class _Timed:
    """One timed unit pass, in the place of the profile's traced one."""

    cost: UnitCost
    outputs: list[Any]
    spec: pytree.TreeSpec
    collects: bool = False


@dataclass
class _Timer(Tracer):
    """A tracer that gives each new unit real weights and runs it a few times."""

    dtype: torch.dtype = torch.float32
    collects: bool = False  # the model takes tensors from inside its units, so every visit has to run
    large: Collection[str] = ()  # units that are not run: only the shapes of their outputs are worked out
    stop: int = -1  # the visit at which the pass ends
    restore: dict[_Place, nn.Parameter] = field(default_factory=dict)

    def visit(self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if len(self.visits) == self.stop:
            raise _Enough
        last = len(self.visits) == self.last
        self._runs = name not in self.large
        real = _materialize(module, self.dtype, self.device) if last or (self.collects and self._runs) else {}
        try:
            return super().visit(name, module, forward, args, kwargs)
        finally:
            if last:
                self.restore = real  # its graph is still to be run backward
            else:
                _give_back(real)

    def _measure(
        self, module: nn.Module, forward: Callable[..., Any], flat: list[Any], spec: pytree.TreeSpec, grad: bool
    ) -> Any:
        if not self._runs:
            return contextvars.Context().run(self._unrun, module, forward, flat, spec)
        real = _materialize(module, self.dtype, self.device)
        cost = UnitCost()
        try:
            outputs, out_spec, cost.forward_seconds = self._forward(forward, flat, spec)
            if grad:
                cost.backward_seconds = self._backward(forward, flat, spec, outputs)
        finally:
            _give_back(real)
        storages = {x.untyped_storage()._cdata: i for i, x in enumerate(flat) if isinstance(x, Tensor)}
        return _Timed(cost, [template(x, storages) for x in outputs], out_spec, self.collects)

    def _unrun(self, module: nn.Module, forward: Callable[..., Any], flat: list[Any], spec: pytree.TreeSpec) -> _Timed:
        """The shapes of what the unit returns, from a run on tensors without memory."""
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            inputs = [fake.from_tensor(x) if isinstance(x, Tensor) else x for x in flat]
            weights = _materialize(module, self.dtype, self.device)
            try:
                args, kwargs = pytree.tree_unflatten(inputs, spec)
                outputs, out_spec = pytree.tree_flatten(forward(*args, **kwargs))
            finally:
                _give_back(weights)
            storages = {x.untyped_storage()._cdata: i for i, x in enumerate(inputs) if isinstance(x, Tensor)}
            return _Timed(UnitCost(), [template(x, storages) for x in outputs], out_spec)

    def _forward(
        self, forward: Callable[..., Any], flat: list[Any], spec: pytree.TreeSpec
    ) -> tuple[list[Any], pytree.TreeSpec, float]:
        def run() -> Any:
            with torch.no_grad():
                args, kwargs = pytree.tree_unflatten([detach(x, False) for x in flat], spec)
                return forward(*args, **kwargs)

        result, seconds = self._repeat(run)
        outputs, out_spec = pytree.tree_flatten(result)
        return outputs, out_spec, seconds

    def _backward(
        self, forward: Callable[..., Any], flat: list[Any], spec: pytree.TreeSpec, outputs: list[Any]
    ) -> float:
        """Seconds of backward alone; the forward with grad that it needs is not counted."""
        gradients = [torch.ones_like(x) if isinstance(x, Tensor) and x.is_floating_point() else None for x in outputs]
        seconds: list[float] = []
        while not _enough(seconds):
            with torch.enable_grad():
                args, kwargs = pytree.tree_unflatten([detach(x, True) for x in flat], spec)
                again = pytree.tree_leaves(forward(*args, **kwargs), is_leaf=lambda x: x is None)
            begin = self._now()
            backward(again, gradients)
            seconds.append(self._now() - begin)
        return median(seconds[1:])

    def _repeat(self, run: Callable[[], Any]) -> tuple[Any, float]:
        result, seconds = None, list[float]()
        while not _enough(seconds):
            result = None
            begin = self._now()
            result = run()
            seconds.append(self._now() - begin)
        return result, median(seconds[1:])

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _enough(seconds: list[float]) -> bool:
    return len(seconds) >= REPEATS and (sum(seconds) >= SECONDS or len(seconds) >= MOST_REPEATS)


def _measure(
    model: nn.Module,
    units: Sequence[UnitModules],
    micro_batch: int,
    sequence_length: int,
    dtype: torch.dtype,
    device: str,
    with_backward: bool,
    collects: bool,
    large: Collection[str],
    stop: int,
) -> dict[str, tuple[float, float]]:
    """(forward, backward) seconds by unit name, summed over the unit's visits in one forward; those in `large` are not
    run, nor is anything from visit `stop` on."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))

        def filled(buffer: Tensor) -> Tensor:
            value = 1.0 if buffer.is_floating_point() else 0
            return torch.full(buffer.shape, value, dtype=buffer.dtype, device=device)

        clone = empty_copy(model, dtype, "meta", filled)
        if not with_backward:
            clone.requires_grad_(False)
        owners = owners_of(model, clone, units)
        _materialize(clone, dtype, device, apart_from={id(m) for m in clone.modules() if id(m) in owners})
        example = default_batch(model, micro_batch, sequence_length)
        # any token but a special one, which some models warn of
        token = {"input_ids": int(getattr(model.config, "vocab_size", 2)) // 2}
        batch = {k: torch.full(v.shape, token.get(k, 0), dtype=v.dtype, device=device) for k, v in example.items()}
        for p in clone.parameters():
            if p.requires_grad and not p.is_meta:
                p.register_post_accumulate_grad_hook(_free)
        seconds: Any = _Seconds()
        first = _Timer(seconds, device, owners, dtype=dtype, collects=collects, large=large, stop=stop)
        whole = True
        with boundaries(clone, first):
            try:
                loss_of(clone(**batch))
            except _Enough:
                whole = False
        first.tape.clear()
        tail = min(_tail(clone, batch, owners, first, dtype, device) for _ in range(2)) if whole else 0.0
    found: dict[str, tuple[float, float]] = {}
    for i, (name, passed) in enumerate(first.visits):
        if name in large:
            continue
        forward, back = found.get(name, (0.0, 0.0))
        one = passed.cost
        last = whole and i == len(first.visits) - 1
        once = max(0.0, tail - one.forward_seconds) if last else one.backward_seconds
        found[name] = (forward + one.forward_seconds, back + once)
    return found


def _tail(
    clone: nn.Module,
    batch: Mapping[str, Tensor],
    owners: dict[int, str],
    first: _Timer,
    dtype: torch.dtype,
    device: str,
) -> float:
    """Seconds from the last visit's forward through the loss to the end of its backward."""
    last = len(first.visits) - 1
    seconds: Any = _Seconds()
    timer = _Timer(
        seconds, device, owners, first.traced, last=last, dtype=dtype, collects=first.collects, large=first.large
    )
    with boundaries(clone, timer):
        loss = loss_of(clone(**batch))
    try:
        if loss.requires_grad:
            loss.backward(retain_graph=True)
        outputs, leaves = timer.kept
        backward(outputs, [x.grad if isinstance(x, Tensor) else None for x in leaves])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - float(seconds.begin)
    finally:
        _give_back(timer.restore)


def _materialize(
    module: nn.Module, dtype: torch.dtype, device: str, apart_from: set[int] | None = None
) -> dict[_Place, nn.Parameter]:
    """Give the module's meta parameters random values (ties kept); returns what was there."""
    before: dict[_Place, nn.Parameter] = {}
    made: dict[int, nn.Parameter] = {}
    below = [module]
    while below:  # no function that calls itself: it would hold the weights until the next collection
        m = below.pop()
        for name, p in m._parameters.items():
            if p is not None and p.is_meta:
                before[m, name] = p
                if id(p) not in made:
                    value = torch.empty(p.shape, dtype=p.dtype, device=device)
                    if p.is_floating_point():
                        value.normal_(0.0, 0.02)
                    made[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
                    if p.requires_grad:
                        made[id(p)].register_post_accumulate_grad_hook(_free)
                m._parameters[name] = made[id(p)]
        below += [child for child in m.children() if apart_from is None or id(child) not in apart_from]
    return before


def _give_back(before: dict[_Place, nn.Parameter]) -> None:
    for (module, name), p in before.items():
        module._parameters[name] = p


def _free(p: Tensor) -> None:
    p.grad = None
