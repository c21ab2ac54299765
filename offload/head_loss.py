"""Head and loss together: the head's logits are never held in float32, and in chunks of rows if the plan says so.

The head's forward returns `Logits`, a tensor that stands for `hidden @ weight.T + bias` and computes nothing. What the
model's own code does to it on the way to its loss (a cast, a scale, a soft cap, a reshape) is noted down, and
`cross_entropy` is where the numbers are made:

    hidden ──rows──► logits of a chunk (compute dtype) ──a few rows──► cast, scale, cross entropy in float32
       ▲                    │ overwritten by their gradient ◄──a few rows──┘
       └── input gradient ──┴──► weight gradient, straight into the unit's gradient slot

So labels, their shift, ignored targets, label smoothing and the number of items are the model's own business. With one
chunk every number is that of the model's own loss to the bit: the same matrix products, and of what lies between them
only independent rows are cut apart. With several chunks the logits are computed again in backward, and the weight
gradient is a sum over the chunks: the same to rounding.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload.units import Unit, output_embeddings

log = logging.getLogger(__name__)

# Elements of logits in float32 at one time. On a CPU they and their gradient stay in a core's cache, and below
# malloc's threshold for giving memory back at once, so that no page is faulted in anew.
PIECE_ELEMENTS = {"cpu": 192 * 1024, "cuda": 16 << 20}
# Bytes of the weight gradient computed at a time where it has to be added to what the slot holds.
_BLOCK_BYTES = 8 << 20

# What is known of a tensor without its values ("__get__": shape, dtype, device, ndim).
_FACTS = {
    "__get__", "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous",
    "is_floating_point", "get_device", "__len__", "__hash__",
}  # fmt: skip
_SHAPES = {"view", "reshape", "flatten", "contiguous"}
_ELEMENTWISE = {
    "float", "bfloat16", "half", "to", "type", "tanh", "mul", "multiply", "div", "divide", "true_divide", "add", "sub",
    "neg", "clamp", "__mul__", "__rmul__", "__truediv__", "__add__", "__radd__", "__sub__", "__neg__",
}  # fmt: skip

# What is to receive a parameter's gradient: a tensor of the parameter's shape, and whether a sum is already there.
Slot = Callable[[nn.Parameter], tuple[Tensor, bool]]


class LogitsUsed(Exception):
    """The model does something with its logits that cannot be done by rows; the message says what."""


@dataclass(frozen=True)
class HeadLoss:
    """How head and loss are computed.

    Args:
        chunks: parts into which a micro-batch's rows are cut for the head's matrix products.
        slot: where the head's parameters' gradients go.
        strict: raise LogitsUsed where the model uses its logits otherwise, instead of computing them with a warning.
        sample: compute one piece of every chunk only (tracing: all pieces are alike).
    """

    chunks: int
    slot: Slot
    strict: bool = False
    sample: bool = False

    def logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Stands for `head(hidden)`: hidden [..., H] in, [..., V] out."""
        return Logits(self, head, hidden, (), hidden.dtype)

    def pieces(self, rows: int, row_elements: int, device: torch.device) -> Iterator[slice]:
        """The rows of a chunk, as many at a time as are held in float32."""
        size = max(1, PIECE_ELEMENTS[device.type] // row_elements)
        for at in range(0, rows, size):
            yield slice(at, min(at + size, rows))
            if self.sample:
                return

    def split(self, rows: int) -> Iterator[slice]:
        """The chunks of a micro-batch's rows, equal but for the last."""
        size = -(-rows // self.chunks)
        return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def find_head(model: nn.Module, units: Sequence[Unit]) -> nn.Linear | None:
    """The output embedding, if it is one plain linear layer at the boundary of a unit."""
    head = output_embeddings(model)
    at_boundary = any(m is head for unit in units for m in unit.modules)
    return head if type(head) is nn.Linear and at_boundary else None


class Logits(Tensor):
    """The logits that were not computed: of which hidden states, and what was done to them since."""

    _loss: HeadLoss
    _head: nn.Linear
    _hidden: Tensor
    _steps: tuple[Callable[[Tensor], Tensor], ...]

    @staticmethod
    def __new__(
        cls, loss: HeadLoss, head: nn.Linear, hidden: Tensor, steps: tuple[Any, ...], dtype: torch.dtype
    ) -> Any:
        shape = (*hidden.shape[:-1], head.out_features)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        made._loss, made._head, made._hidden, made._steps = loss, head, hidden, steps
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Logits({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.cross_entropy:
            found = _cross_entropy(*args, **kwargs)
        else:
            found = _noted(func, name, args, kwargs)
        return _computed(func, name, args, kwargs) if found is None else found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise LogitsUsed(f"{func} takes the logits where they cannot be computed")

    def computed(self) -> Tensor:
        """The real logits, whole, with their graph."""
        x = F.linear(self._hidden, self._head.weight, self._head.bias)
        for step in self._steps:
            x = step(x)
        return x


def _noted(func: Any, name: str, args: Any, kwargs: Any) -> Tensor | None:
    """The logits after an operation that can be done by rows later; None if this is no such operation."""
    if not args or not isinstance(args[0], Logits):
        return None
    x, *rest = args
    if name in _SHAPES:
        with torch._C.DisableTorchFunctionSubclass():
            like = torch.empty(1, device="meta").expand(x.shape)
            shape = like.shape if name == "contiguous" else func(like, *rest, **kwargs).shape
        if shape[-1:] != x.shape[-1:]:
            return None
        return Logits(x._loss, x._head, x._hidden.reshape(*shape[:-1], x._hidden.shape[-1]), x._steps, x.dtype)
    constants = all(_is_constant(a, x.device) for a in (*rest, *kwargs.values()))
    if name not in _ELEMENTWISE or not constants or "out" in kwargs:
        return None

    def step(value: Tensor) -> Tensor:
        result: Tensor = func(value, *rest, **kwargs)
        return result

    return Logits(
        x._loss, x._head, x._hidden, (*x._steps, step), step(torch.empty(0, dtype=x.dtype, device=x.device)).dtype
    )


def _is_constant(x: Any, device: torch.device) -> bool:
    if isinstance(x, Tensor):
        return type(x) is not Logits and x.dim() == 0 and not x.requires_grad
    if isinstance(x, (str, torch.device)):
        return torch.device(x) == device
    return x is None or isinstance(x, (bool, int, float, torch.dtype))


def _computed(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Anything else that the model does with its logits, on the real ones."""
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Logits)), None)
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")
    if x is None or x._loss.strict or in_place:
        raise LogitsUsed(f"{name or func} takes the logits")
    log.warning("the head's logits are computed whole, unlike planned, because %s takes them", name)
    real = [a.computed() if isinstance(a, Logits) else a for a in args]
    return func(*real, **{k: v.computed() if isinstance(v, Logits) else v for k, v in kwargs.items()})


_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


def _cross_entropy(*args: Any, **kwargs: Any) -> Tensor | None:
    """`torch.nn.functional.cross_entropy`; None for the forms that need the logits whole."""
    given = _CROSS_ENTROPY.bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    x, target = a["input"], a["target"]
    plain = a["weight"] is None and a["size_average"] is None and a["reduce"] is None
    if not plain or not isinstance(x, Logits) or x.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return None
    spec = _Rows(x._loss, x._head, x._steps, target, a["ignore_index"], a["label_smoothing"], x.dtype)
    rows: Tensor = _RowLosses.apply(x._hidden, x._head.weight, x._head.bias, spec)
    if a["reduction"] == "none":
        return rows
    # The sum over rows in the order in which the loss over whole logits takes it: as of log probabilities with one
    # class. Its backward gives every row its share, and ignored rows zero.
    counted = torch.where(target == a["ignore_index"], -100, 0)
    return F.nll_loss((-rows).unsqueeze(1), counted, reduction=a["reduction"])


@dataclass(frozen=True)
class _Rows:
    """What turns rows of logits into losses."""

    loss: HeadLoss
    head: nn.Linear
    steps: tuple[Callable[[Tensor], Tensor], ...]
    target: Tensor  # [R]
    ignore_index: int
    label_smoothing: float
    dtype: torch.dtype

    def of(self, logits: Tensor, rows: slice) -> Tensor:
        """The losses of a few rows, [n]."""
        for step in self.steps:
            logits = step(logits)
        return F.cross_entropy(
            logits,
            self.target[rows],
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def pieces(self, logits: Tensor, chunk: slice) -> Iterator[tuple[Tensor, slice]]:
        """A few rows of a chunk's logits at a time, and which rows of the micro-batch they are."""
        for piece in self.loss.pieces(len(logits), logits.shape[1], logits.device):
            yield logits[piece], slice(chunk.start + piece.start, chunk.start + piece.stop)


class _RowLosses(torch.autograd.Function):
    """hidden [R, H] -> losses [R]; the head's parameters get their gradients in their slots, not from autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, spec: _Rows) -> Tensor:
        losses = torch.empty(len(hidden), dtype=spec.dtype, device=hidden.device)
        logits = None
        for chunk in spec.loss.split(len(hidden)):
            logits = None  # before the next is made
            logits = F.linear(hidden[chunk], weight, bias)
            for part, rows in spec.pieces(logits, chunk):
                losses[rows] = spec.of(part, rows)
        ctx.spec, ctx.hidden = spec, hidden
        ctx.logits = logits if spec.loss.chunks == 1 and any(ctx.needs_input_grad) else None
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        spec, hidden, weight, bias = ctx.spec, ctx.hidden, ctx.spec.head.weight, ctx.spec.head.bias
        (of_losses,) = gradients
        wants = [p for p in (weight, bias) if p is not None and p.requires_grad]
        slots = {id(p): spec.loss.slot(p) for p in wants}
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logits, ctx.logits = ctx.logits, None
        for i, chunk in enumerate(spec.loss.split(len(hidden))):
            if spec.loss.chunks > 1:
                logits = None
                logits = F.linear(hidden[chunk], weight, bias)
            assert logits is not None, "backward of a head's loss runs once"
            for part, rows in spec.pieces(logits, chunk):
                x = part.detach().requires_grad_()
                with torch.enable_grad():
                    losses = spec.of(x, rows)
                part.copy_(torch.autograd.grad(losses, x, of_losses[rows])[0])
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[chunk])
            for p in wants:
                target, summed = slots[id(p)]
                if p is weight:
                    _add_product(target, logits, hidden[chunk], summed or i > 0)
                else:
                    _add(target, logits.sum(0), summed or i > 0)
        return of_hidden, None, None, None


def _add_product(target: Tensor, of_logits: Tensor, hidden: Tensor, summed: bool) -> None:
    """target [V, H] (+)= of_logits.T @ hidden, each product rounded to the compute dtype as autograd's is."""
    if not summed and target.dtype == hidden.dtype:
        torch.mm(of_logits.t(), hidden, out=target)
        return
    size = max(1, _BLOCK_BYTES // (hidden.shape[1] * hidden.itemsize))
    for at in range(0, len(target), size):
        _add(target[at : at + size], torch.mm(of_logits[:, at : at + size].t(), hidden), summed)


def _add(target: Tensor, addend: Tensor, summed: bool) -> None:
    if summed:
        target.add_(addend)
    else:
        target.copy_(addend)
