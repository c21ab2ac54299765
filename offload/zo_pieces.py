"""A unit's weights in a slot: updated in place, and perturbed into another buffer, piece by piece.

A piece is small enough for a core's cache, so that the noise, the update and the perturbation of one piece cost one
pass over memory. Pieces are independent, and several threads work on them at once; the numbers do not depend on how.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from offload import zo_noise
from offload.config import Config
from offload.device import limit_lane_threads
from offload.layout import ParamSlot, UnitLayout
from offload.zo_formats import GROUP, Format, Quantized, Role, make_format
from offload.zo_variants import Branch, Piece, Update, Variant, magnitude_threshold, make_variant

# Elements of one piece: what a core's second-level cache holds of noise, values and estimate; on a GPU, where pieces
# run one after the other, enough to fill it.
PIECE_ELEMENTS = {"cpu": 64 * 1024, "cuda": 512 * 1024}
_PAGE = 4096


def roles_of(format: Format, variant: Variant) -> tuple[Role, ...]:
    """All stored roles of a unit's trainable space, in the order they have in a slot."""
    per = GROUP if isinstance(format, Quantized) else 1
    return (*format.roles, *(Role(name, 4, per, True, torch.float32) for name in variant.states))


def make_pieces(cfg: Config, compute: torch.dtype, device: str) -> Pieces:
    """The arithmetic of a configuration with `train.method: zo`, on as many threads as compute has."""
    threads = torch.get_num_threads()
    return Pieces(make_format(cfg, compute), make_variant(cfg), compute, device, cfg.train.seed, threads)


class Pieces:
    """Does the arithmetic of one run on slots that hold a unit's roles one after the other, each on pages of its own.

    Args:
        compute: dtype of the weights that forward passes use.
        device: "cpu" or "cuda", where the slots are.
        threads: that work on pieces at once (on the CPU).
    """

    def __init__(
        self, format: Format, variant: Variant, compute: torch.dtype, device: str, seed: int, threads: int = 1
    ) -> None:
        self.format = format
        self.variant = variant
        self.compute = compute
        self.roles = roles_of(format, variant)
        self.thresholds: dict[str, float] = {}
        self._seed = seed
        self._device = device
        self._elements = PIECE_ELEMENTS[device]
        self._local = threading.local()
        self._threads = threads if device == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Stop the threads; they start again when they are needed."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    # ---- where things are in a slot ----

    def sizes(self, layout: UnitLayout) -> dict[str, int]:
        """Bytes of each stored role of a unit."""
        sizes = {role.name: role.size(layout.trainable_elements) for role in self.roles}
        sizes["frozen"] = layout.frozen_elements * self.compute.itemsize
        return {name: n for name, n in sizes.items() if n}

    def trainable_bytes(self, layout: UnitLayout) -> int:
        """Bytes of a slot before the frozen weights: room for the stored roles, and for weights to compute with."""
        stored = sum(_pages(role.size(layout.trainable_elements)) for role in self.roles)
        return max(stored, _pages(layout.trainable_elements * self.compute.itemsize))

    def part(self, layout: UnitLayout, slot: Tensor, name: str) -> Tensor:
        """The bytes of one stored role in a slot."""
        if name == "frozen":
            start = self.trainable_bytes(layout)
            return slot[start : start + layout.frozen_elements * self.compute.itemsize]
        start = 0
        for role in self.roles:
            size = role.size(layout.trainable_elements)
            if role.name == name:
                return slot[start : start + size]
            start += _pages(size)
        raise KeyError(name)

    def parts(self, layout: UnitLayout, slot: Tensor) -> dict[str, Tensor]:
        """Every stored role of the trainable space in a slot, in its dtype."""
        return {role.name: self.part(layout, slot, role.name).view(role.dtype) for role in self.roles}

    def weights(self, layout: UnitLayout, slot: Tensor) -> Tensor:
        """A slot as weights to compute with: the trainable space in the compute dtype."""
        return slot[: layout.trainable_elements * self.compute.itemsize].view(self.compute)

    @property
    def in_place(self) -> bool:
        """Whether weights at rest are what is computed with, so that a slot can be perturbed where it is."""
        return type(self.format) is Format and self.format.dtype == self.compute and not self.variant.states

    # ---- arithmetic ----

    def advance(
        self,
        layout: UnitLayout,
        slot: Tensor,
        updates: Sequence[Update] = (),
        branch: Branch | None = None,
        target: Tensor | None = None,
    ) -> None:
        """Apply updates to the weights in `slot`, in order, and form the weights of `branch` in `target`.

        `target` may be the slot itself where `in_place`; its clean weights are then gone.
        """
        parts = self.parts(layout, slot)
        out = None if target is None else self.weights(layout, target)
        self._know_thresholds(layout, parts)

        def run(start: int) -> None:
            stop = min(start + self._elements, layout.trainable_elements)
            for parameter, first, count, at in layout.pieces(True, start, stop):
                span = slice(start + at, start + at + count)
                self._one(parameter, first, span, parts, updates, branch, out)

        starts = range(0, layout.trainable_elements, self._elements)
        if self._threads == 1 or len(starts) < 2:
            for start in starts:
                run(start)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "zo", initializer=limit_lane_threads)
        list(self._pool.map(run, starts))

    def encode(self, parts: Mapping[str, Tensor], span: slice, values: Tensor) -> None:
        """Store first weights, float32, at elements `span`, which begins at a multiple of 64. Moments stay as they are.

        Values may be changed.
        """
        held = dict(parts)
        if isinstance(self.format, Quantized):
            padded = torch.nn.functional.pad(values, (0, -values.numel() % GROUP))
            integers, scales = self.format.quantize(padded)
            first = span.start * self.format.bits // 8
            held["param"][first : first + integers.numel()] = integers
            held["scale"][span.start // GROUP : span.start // GROUP + scales.numel()] = scales
            return
        self.format.round(values, None)
        if self.format.exact:
            held["param"][span].copy_(values)
        self.format.write(held, span, values)

    def decode(self, parts: Mapping[str, Tensor], span: slice) -> Tensor:
        """Weights of elements `span`, which begins at a multiple of 64: in the compute dtype, a copy."""
        held = dict(parts)
        if isinstance(self.format, Quantized):
            scales = held["scale"][span.start // GROUP : -(-span.stop // GROUP)]
            return self.format.weights(held, span, scales).to(self.compute)
        out = torch.empty(span.stop - span.start, dtype=torch.float32, device=held["param"].device)
        return self.format.read(held, span, out).to(self.compute, copy=True)

    def _one(
        self,
        parameter: ParamSlot,
        first: int,
        span: slice,
        parts: dict[str, Tensor],
        updates: Sequence[Update],
        branch: Branch | None,
        out: Tensor | None,
    ) -> None:
        quantized = self.format if isinstance(self.format, Quantized) else None
        tuned = slice(span.start // GROUP, -(-span.stop // GROUP)) if quantized else span
        n = tuned.stop - tuned.start
        scratch = self._scratch()
        values = parts["scale"][tuned] if quantized else self.format.read(parts, span, scratch[0][:n])
        states = {name: parts[name][tuned] for name in self.variant.states}
        offset = first // GROUP if quantized else first
        key = zo_noise.name_key(parameter.name)
        threshold = self.thresholds.get(parameter.name, 0.0)
        piece = Piece(key, offset, values, states, scratch[1][:n], scratch[2][:n], threshold)
        for update in updates:
            self._apply(piece, update, parameter.name)
        if updates:
            self.format.write(parts, span, values)
        if branch is None or out is None:
            return
        target, moved = out[span], values
        if branch.update is not None:
            moved = scratch[3][:n].copy_(values)
            tried = Piece(key, offset, moved, states, piece.noise, piece.estimate, threshold)
            self._apply(tried, branch.update, parameter.name)
        elif branch.epsilon:
            moved = target if out.dtype == torch.float32 and not quantized else scratch[3][:n]
            self.variant.perturb(piece, branch.seed, branch.epsilon, moved)
        if moved is not target:
            target.copy_(quantized.weights(parts, span, moved) if quantized else moved)

    def _apply(self, piece: Piece, update: Update, name: str) -> None:
        self.variant.apply(piece, update)
        uniform = None
        if self.format.stochastic:
            uniform, key = piece.noise, zo_noise.name_key(f"rounding of {name}")
            zo_noise.fill_uniform(uniform, self._seed + update.step, key, piece.offset)
        self.format.round(piece.values, uniform)

    def _know_thresholds(self, layout: UnitLayout, parts: dict[str, Tensor]) -> None:
        if not self.variant.needs_threshold:
            return
        for p in layout.params:
            if p.trainable and p.name not in self.thresholds:
                stored = parts["param"][p.offset : p.offset + p.numel]
                self.thresholds[p.name] = magnitude_threshold(stored, self.variant.zo.sparsity)

    def _scratch(self) -> list[Tensor]:
        """Working memory of the calling thread: values, noise, estimate, perturbed values."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = list(torch.empty(4, self._elements, device=self._device))
        return self._local.buffers


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
