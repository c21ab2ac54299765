"""What each unit of a model computes and allocates, found by running the model's own forward on fake tensors.

No weights, no GPU, no memory in proportion to the model. `tracer.py` stands at the boundaries of the units.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from offload.planner.bounds import UnitModules, estimate_costs
from offload.planner.live import LiveBytes
from offload.planner.plan import Profile, UnitCost
from offload.planner.tracer import Head, Tracer, backward, boundaries, loss_of, owners_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def profile_model(
    model: nn.Module,
    units: Sequence[UnitModules],
    *,
    micro_batch: int,
    sequence_length: int,
    dtype: str | torch.dtype,
    device: str = "cpu",
    batch: Mapping[str, Tensor] | None = None,
    backward: bool = True,
    head: Head | None = None,
    whole_rows: bool = False,
) -> Profile:
    """Profile one training micro-batch of `model`, whose parameters may be on meta; the model is not touched.

    `dtype` is what floating-point parameters are computed in; buffers keep their own. `batch` gives one micro-batch by
    example (shapes and dtypes count); by default input_ids and labels. Attention masks that a packed or padded batch
    needs are counted, unless all are `whole_rows`: one sequence each, from end to end. With `head`, the model's head
    and what its loss does with the logits are traced as they run when computed together; if the model does not allow
    that, a note says why. Without `backward` nothing is kept for one, and `workspace_backward` is that of the last unit
    and the loss alone. A model that cannot be traced is estimated from parameter shapes, with a note that says why.
    """
    compute = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    notes: list[str] = []
    if device == "cuda" and not torch.cuda.is_available():
        device = "cpu"  # fake CUDA tensors need a CUDA build; the CPU's operators allocate much the same
        notes.append("profile: traced with the CPU's operators, because there is no CUDA device here")
    example = batch if batch is not None else default_batch(model, micro_batch, sequence_length)
    reason = ""
    for experts in (None, "grouped_mm"):  # a loop over the experts that got tokens has no shapes to trace
        try:
            found = _trace(model, units, compute, device, example, experts, backward, whole_rows, None)
            if head is not None:
                found = _with_head(found, model, units, compute, device, example, experts, backward, whole_rows, head)
            return replace(found, notes=(*notes, *found.notes))
        except Exception as error:  # whatever a model's own code raises on fake tensors, a plan is still wanted
            reason = reason or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if not hasattr(model, "set_experts_implementation"):
                break
    notes.append(f"profile: estimated because the model cannot be traced ({reason[:200]})")
    return Profile(
        estimate_costs(model, units, micro_batch * sequence_length, sequence_length, compute), 0, tuple(notes)
    )


def default_batch(model: nn.Module, micro_batch: int, sequence_length: int) -> dict[str, Tensor]:
    """Token ids and labels of one micro-batch on meta: [B, S], or labels [B] for a sequence classifier."""
    ids = torch.empty(micro_batch, sequence_length, dtype=torch.long, device="meta")
    labels = torch.empty_like(ids)
    if type(model).__name__.endswith("ForSequenceClassification"):
        labels = torch.empty(micro_batch, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": labels}


def _with_head(whole: Profile, *args: Any) -> Profile:
    """The profile with head and loss computed together, or the one with logits whole and a note why."""
    try:
        found = _trace(*args)
        reason = "" if found.logits_bytes else "the head is not the last unit"
    except Exception as error:  # whatever the model's own code does with logits that were not computed
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
    if reason:
        note = f"head: the model's own loss over whole logits is used, because {reason[:200]}"
        return replace(whole, notes=(*whole.notes, note))
    return found


def _trace(
    model: nn.Module,
    units: Sequence[UnitModules],
    compute: torch.dtype,
    device: str,
    example: Mapping[str, Tensor],
    experts: str | None,
    with_backward: bool,
    whole_rows: bool,
    head: Head | None,
) -> Profile:
    live = LiveBytes()
    with ExitStack() as stack:
        if whole_rows:
            stack.enter_context(_not_packed())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        clone = fake_copy(model, compute, device)
        if not with_backward:
            clone.requires_grad_(False)
        if experts is not None:
            set_experts: Any = clone.set_experts_implementation  # a method of every model of the library
            set_experts(experts)
        owners = owners_of(model, clone, units)
        batch = {k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in example.items()}
        live.ignore([*clone.parameters(), *clone.buffers(), *batch.values()])
        for p in clone.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(free_gradient)
        stack.enter_context(live)
        first = Tracer(live, device, owners)
        with boundaries(clone, first):
            loss_of(clone(**batch))
        if not first.visits:
            raise RuntimeError("the forward visited no unit")
        first.tape.clear()
        second = Tracer(live, device, owners, first.traced, last=len(first.visits) - 1)
        if head is not None:
            names = {id(m): name for name, m in model.named_modules()}
            second.head = clone.get_submodule(names[id(head[0])]), head[1]
        start = live.mark()
        with boundaries(clone, second):
            loss = loss_of(clone(**batch))
        if loss.requires_grad:
            loss.backward(retain_graph=True)
        del loss
        outputs, leaves = second.kept
        gradients = [x.grad if isinstance(x, Tensor) else None for x in leaves]
        second.kept = ([], [])
        del leaves
        backward(outputs, gradients)
        del outputs, gradients
        tail = live.peak - second.entry
    return _collect(units, second, tail, second.entry - start)


@contextmanager
def _not_packed() -> Iterator[None]:
    """Take all rows for one sequence each.

    transformers looks into position ids, its own too, to see whether rows are packed; into fake ones it cannot look,
    and makes the mask of packed rows, [B, 1, S, S] bool, to be safe. Real position ids that go up by one need none.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:  # then the model makes its masks itself
        yield
        return
    look = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = look


def _collect(units: Sequence[UnitModules], tracer: Tracer, tail: int, at_tail: int) -> Profile:
    """Sum the visits by unit. What lives at the last visit and is no unit's output lives around the units."""
    costs = {name: UnitCost() for name, _, _ in units}
    boundaries = 0
    for i, (name, found) in enumerate(tracer.visits):
        total, one = costs[name], found.cost
        total.visits += 1
        total.forward_flops += one.forward_flops
        total.workspace_forward = max(total.workspace_forward, one.workspace_forward)
        if i == tracer.last:
            total.kept = True
            total.workspace_backward = max(total.workspace_backward, tail)
            if tracer.logits_bytes:
                total.workspace_forward = min(total.workspace_forward, tail)
        else:
            total.boundary_bytes += one.boundary_bytes
            boundaries += one.boundary_bytes
            total.saved += one.saved
            total.workspace_backward = max(total.workspace_backward, one.workspace_backward)
            total.workspace_kept = max(total.workspace_kept, one.workspace_kept)
            total.workspace_graph = max(total.workspace_graph, one.workspace_graph)
            total.workspace_unsaved = max(total.workspace_unsaved, one.workspace_unsaved)
    around = max(0, at_tail - boundaries) + _shared_gradients(tracer.tape)
    return Profile(costs, around, logits_bytes=tracer.logits_bytes)


def _shared_gradients(tape: list[list[Any]]) -> int:
    """Bytes of gradients that build up over several units, because each of them reads the tensor."""
    readers: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for flat in tape:
        for x in {id(x): x for x in flat if isinstance(x, Tensor) and x.requires_grad}.values():
            readers[id(x)] = readers.get(id(x), 0) + 1
            sizes[id(x)] = x.numel() * x.element_size()
    return sum(sizes[key] for key, count in readers.items() if count > 1)


def fake_copy(model: nn.Module, compute: torch.dtype, device: str) -> nn.Module:
    """A copy with empty parameters and buffers on `device`, fake ones under FakeTensorMode."""
    return empty_copy(model, compute, device, lambda b: torch.empty(b.shape, dtype=b.dtype, device=device))


def empty_copy(
    model: nn.Module, compute: torch.dtype, device: str, buffer: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy to train, with empty parameters on `device` and with `buffer(b)` for every buffer b; the originals are
    neither copied nor changed."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        dtype = compute if p.is_floating_point() else p.dtype
        twin = torch.empty(p.shape, dtype=dtype, device=device)
        memo[id(p)] = nn.Parameter(twin, requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = buffer(b)
    clone = copy.deepcopy(model, memo)
    for module in clone.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = False
    return clone.train()


def free_gradient(p: Tensor) -> None:
    """The engine moves a parameter's gradient to its slot as soon as it is complete."""
    p.grad = None
