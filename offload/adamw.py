"""AdamW on flat chunks, to the bit what `torch.optim.AdamW(fused=True)` computes on whole tensors.

A bfloat16 run keeps its float32 master without storing it: weight = bfloat16 by round to nearest even, and
low = int16(bits(master) - (bits(weight) << 16)). Round-to-nearest-even leaves one ambiguous case, an exact tie that was
rounded down (low would be +32768, which wraps to -32768); it is marked in the sign bit of `exp_avg_sq`, which is never
negative. 12 bytes per parameter hold what 14 hold elsewhere, and no value is lost.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload.device import lane_threads, limit_lane_threads

if TYPE_CHECKING:  # it imports this module, and is itself imported only where it is wanted
    from offload.adamw_jit import Jit

# Elements updated at a time: the arrays of one pass stay in a core's second-level cache.
CACHE_ELEMENTS = 64 * 1024
# Elements whose state stays in a core's share of the third-level cache from one pass over it to the next.
WINDOW_ELEMENTS = 256 * 1024
# Fewest elements that are worth a thread's waking up where several threads share a chunk.
_SHARE_ELEMENTS = 128 * 1024

# (first element within the chunk, its end, the parameter's step count with this update).
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class Hyper:
    """What one optimizer step needs beside the tensors; `coefficient` is the clipping factor (fp32 scalar) or None."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    coefficient: Tensor | None


def fused_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    hyper: Hyper,
) -> None:
    """One AdamW step in place on float32 tensors of equal shapes; `steps` counts from 1, gradients are clipped already.

    Exact against whole tensors if each piece starts at a multiple of 64 elements of its tensor (`offload.layout`).
    """
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [torch.tensor(float(step)) for step in steps],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
    )


def merge_master(weight: Tensor, low: Tensor, exp_avg_sq: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Rebuild the float32 master into `out` and clear the tie marks in `exp_avg_sq`.

    Args:
        weight: bfloat16 [n]. low: int16 [n]. exp_avg_sq: float32 [n], changed in place. out: float32 [n], written.
        scratch: int32 [n], overwritten.
    """
    _merge(weight.view(torch.int16), low, exp_avg_sq, exp_avg_sq.view(torch.int32), out.view(torch.int32), scratch)


def split_master(master: Tensor, weight: Tensor, low: Tensor, exp_avg_sq: Tensor, scratch: Tensor) -> None:
    """Write the float32 master [n] as its bfloat16 rounding and low half, and mark ties in `exp_avg_sq`.

    A NaN stays a NaN, though not the same one.

    Args:
        master: float32 [n]. weight: bfloat16 [n], written. low: int16 [n], written.
        exp_avg_sq: float32 [n], non-negative or NaN, its sign bit written. scratch: int32 [n], overwritten.
    """
    _split(
        master, master.view(torch.int32), weight, low, exp_avg_sq, exp_avg_sq.view(torch.int32), scratch,
        scratch.view(torch.float32),
    )  # fmt: skip


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function as TorchScript: its operations follow each other without the interpreter and its lock, so that
    windows can be small and threads do not wait for one another. As it is, and slower, where torch has no such thing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            made: Callable[..., None] = torch.jit.script(function)
    except (AttributeError, OSError, RuntimeError):  # no TorchScript any more, no source to read, not this operator
        return function
    return made


# TorchScript knows views of another dtype only as arguments: `halves` (of bfloat16 weights), `marks`, `bits` and `wide`
# are such views.


@_compiled
def _merge(halves: Tensor, low: Tensor, exp_avg_sq: Tensor, marks: Tensor, bits: Tensor, scratch: Tensor) -> None:
    torch.add(scratch.copy_(low), bits.copy_(halves), alpha=65536, out=bits)
    if int(low.min()) == -32768:  # only these can be marked: in one window of three there is none
        torch.bitwise_right_shift(marks, 31, out=scratch)  # -1 where marked, else 0
        bits.sub_(scratch, alpha=65536)
        exp_avg_sq.abs_()


@_compiled
def _split(
    master: Tensor,
    bits: Tensor,
    weight: Tensor,
    low: Tensor,
    exp_avg_sq: Tensor,
    marks: Tensor,
    scratch: Tensor,
    wide: Tensor,
) -> None:
    exp_avg_sq.abs_()  # a NaN comes with any sign, and as a mark it would carry a NaN weight over into zero
    weight.copy_(master)
    low.copy_(bits)  # what is above its 16 bits is the weight, give or take a carry
    if int(low.min()) == -32768:
        wide.copy_(weight)
        torch.sub(bits, scratch, out=scratch)
        marks.bitwise_or_(scratch.eq_(32768).bitwise_left_shift_(31))


@_compiled
def _update(
    param: Tensor,
    halves: Tensor,
    low: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    marks: Tensor,
    coefficient: Tensor | None,
    master: Tensor,
    bits: Tensor,
    scratch: Tensor,
    wide: Tensor,
    gradient: Tensor,
    step: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW over one piece of a parameter, as many elements at a time as the scratch tensors have.

    `lists` are four of one tensor each: of an operator that writes to the tensors of lists TorchScript sees only that
    it writes to the lists, and leaves it out unless those are the caller's.
    """
    wholes, grads, exp_avgs, exp_avg_sqs = lists[0], lists[1], lists[2], lists[3]
    window = master.size(0)
    params, halved, lows = param.split(window), halves.split(window), halves.split(window)
    if low is not None:
        lows = low.split(window)
    gs, ms, vs, marked = grad.split(window), exp_avg.split(window), exp_avg_sq.split(window), marks.split(window)
    for i in range(len(params)):
        p, g, v = params[i], gs[i], vs[i]
        n = p.size(0)
        if n != window:  # only the last: a view costs as much as half of an operation
            master, bits, scratch = master.narrow(0, 0, n), bits.narrow(0, 0, n), scratch.narrow(0, 0, n)
            wide, gradient = wide.narrow(0, 0, n), gradient.narrow(0, 0, n)
        if g.dtype != torch.float32:
            g = gradient.copy_(g)
        if coefficient is not None:
            g = torch.mul(g, coefficient, out=gradient)
        whole = p
        if low is not None:
            whole = master
            _merge(halved[i], lows[i], v, marked[i], bits, scratch)
        wholes[0], grads[0], exp_avgs[0], exp_avg_sqs[0] = whole, g, ms[i], v
        torch._fused_adamw_(
            wholes, grads, exp_avgs, exp_avg_sqs, [], [step], lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        if low is not None:
            _split(master, bits, p, lows[i], v, marked[i], scratch, wide)


@dataclass(frozen=True)
class Chunk:
    """Flat tensors [n] of one chunk of a unit's state; all but `grad` are updated in place.

    `param` is float32, or bfloat16 with `low`, the int16 low half of its master. `grad` is float32 or bfloat16; the
    moments are float32. Each piece of a parameter starts at a multiple of 64 elements of the parameter.
    """

    param: Tensor
    low: Tensor | None
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def clone(self) -> Chunk:
        """A copy with memory of its own."""
        return self._with(Tensor.clone)

    def to(self, device: torch.device) -> Chunk:
        """The chunk on the device; itself if it is there."""
        return self._with(lambda tensor: tensor.to(device))

    def between(self, start: int, stop: int) -> Chunk:
        """Views of the elements [start, stop)."""
        return self._with(lambda tensor: tensor[start:stop])

    def _with(self, function: Callable[[Tensor], Tensor]) -> Chunk:
        low = None if self.low is None else function(self.low)
        return Chunk(function(self.param), low, function(self.grad), function(self.exp_avg), function(self.exp_avg_sq))

    def same_bits(self, other: Chunk) -> bool:
        """Whether every value is the same to the bit."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return all(a is b is None or torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


def is_plain(chunk: Chunk, hyper: Hyper) -> bool:
    """Whether torch's own kernel does it all."""
    return chunk.low is None and chunk.grad.dtype == torch.float32 and hyper.coefficient is None


class Stock:
    """AdamW over parts of a chunk in torch's own operations, in cache-sized scratch (768 KiB, kept)."""

    def __init__(self) -> None:
        self._master, self._gradient = torch.empty(2, CACHE_ELEMENTS, dtype=torch.float32)
        self._bits = torch.empty(CACHE_ELEMENTS, dtype=torch.int32)

    def part(self, chunk: Chunk, pieces: Sequence[Piece], hyper: Hyper) -> None:
        """One AdamW step in place over some pieces of a chunk."""
        if is_plain(chunk, hyper):
            spans = [slice(start, stop) for start, stop, _ in pieces]
            arrays = (chunk.param, chunk.grad, chunk.exp_avg, chunk.exp_avg_sq)
            params, grads, exp_avgs, exp_avg_sqs = ([t[span] for span in spans] for t in arrays)
            fused_step(params, grads, exp_avgs, exp_avg_sqs, [step for _, _, step in pieces], hyper)
            return
        for start, stop, step in pieces:
            param, exp_avg_sq = chunk.param[start:stop], chunk.exp_avg_sq[start:stop]
            halves = param if chunk.low is None else param.view(torch.int16)
            _update(
                param, halves, None if chunk.low is None else chunk.low[start:stop], chunk.grad[start:stop],
                chunk.exp_avg[start:stop], exp_avg_sq, exp_avg_sq.view(torch.int32), hyper.coefficient, self._master,
                self._master.view(torch.int32), self._bits, self._bits.view(torch.float32), self._gradient,
                torch.tensor(float(step)), [[param], [param], [param], [param]], hyper.lr, hyper.beta1, hyper.beta2,
                hyper.eps, hyper.weight_decay,
            )  # fmt: skip


class Kernel:
    """The optimizer's arithmetic on one chunk after the other, in stock operations or compiled where that is better.

    The compiled kernels are loaded on a thread of their own: steps taken before they are there use stock operations,
    which give the same bits, so no step waits for a compiler.

    Args:
        threads: how many threads share a chunk, the caller's own included.
        jit: use the compiled kernels where they are installed, equal to the bit and faster (`offload.adamw_jit`).
    """

    def __init__(self, threads: int = 1, jit: bool = True) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="adamw", initializer=limit_lane_threads)
        self._own = threading.local()
        self._jit: Jit | None = None
        self._loader: threading.Thread | None = None
        self.reasons: dict[str, str] = {"all": "not asked for"}  # why stock operations are used, by kind of chunk
        if jit:
            self.reasons = {"all": "still being compiled"}
            self._loader = threading.Thread(target=self._load, name="adamw-jit")
            self._loader.start()

    @property
    def window(self) -> int:
        """Elements of a step whose state stays in the threads' caches for another pass."""
        return WINDOW_ELEMENTS * self._threads

    def wait(self) -> None:
        """Return when the compiled kernels are in use or known to be of no use."""
        if self._loader is not None:
            self._loader.join()

    def close(self) -> None:
        """Stop the threads."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()

    def step(
        self,
        param: Tensor,
        low: Tensor | None,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        pieces: Sequence[Piece],
        hyper: Hyper,
    ) -> None:
        """One AdamW step in place over the pieces of parameters in a chunk, in ascending order; see `Chunk`.

        The gradient is read only; `hyper.coefficient` is applied on the way. Elements outside of all pieces keep their
        values. Equal to the bit to `torch.optim.AdamW(fused=True)` on whole float32 tensors.
        """
        if not pieces:
            return
        chunk = Chunk(param, low, grad, exp_avg, exp_avg_sq)
        jit = self._jit
        run = jit.part if jit is not None and jit.takes(chunk, hyper) else self._stock_part
        if self._pool is None:
            run(chunk, pieces, hyper)
            return
        if run == self._stock_part and is_plain(chunk, hyper):  # one call: OpenMP hands it over in a tenth of the time
            with lane_threads(self._threads):
                run(chunk, pieces, hyper)
            return
        # One share per thread, the first one here: handing over costs as much as 50,000 elements.
        span = pieces[-1][1] - pieces[0][0]
        each = max(-(-span // (64 * self._threads)) * 64, _SHARE_ELEMENTS)
        self.share([partial(run, chunk, part, hyper) for part in _parts(pieces, each)])

    def share(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run independent tasks on the threads, the caller's own included; raises the first error when all ended."""
        if self._pool is None or len(tasks) < 2:
            for task in tasks:
                task()
            return
        mine, *others = tasks
        running = [self._pool.submit(other) for other in others]
        try:
            mine()
        finally:
            wait(running)  # they work on the caller's memory
        for other in running:
            other.result()

    def _stock_part(self, chunk: Chunk, pieces: Sequence[Piece], hyper: Hyper) -> None:
        if not hasattr(self._own, "stock"):
            self._own.stock = Stock()
        self._own.stock.part(chunk, pieces, hyper)

    def _load(self) -> None:
        from offload import adamw_jit

        limit_lane_threads()
        loaded = adamw_jit.load()
        self._jit = loaded.jit
        self.reasons = loaded.reasons


def within(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """What of the pieces lies between two elements of the chunk, both multiples of 64 or its end."""
    cut = ((max(first, start), min(end, stop), step) for first, end, step in pieces)
    return [piece for piece in cut if piece[0] < piece[1]]


def _parts(pieces: Sequence[Piece], window: int) -> Iterator[list[Piece]]:
    """Pieces in runs that span at most `window` elements (a multiple of 64), longer ones cut."""
    run: list[Piece] = []
    for start, stop, step in pieces:
        while start < stop:
            room = (run[0][0] if run else start) + window
            if start >= room:
                yield run
                run = []
                continue
            end = min(stop, room)
            run.append((start, end, step))
            start = end
    if run:
        yield run
