"""What autograd saves inside a unit whose graph is kept, intercepted tensor by tensor.

Nothing is saved twice: views of one storage share it, the unit's weights are remembered by name (their slot is refilled
before backward), what crosses the unit's boundary belongs to the tape already. The rest, the unit's inner activations,
are laid out in an *image*: those to stay on the device first, then bytes for RAM, then bytes for the store. In backward
the image of what left lies in a staging buffer of the device, and autograd gets views of it with the dtype, shape,
strides and storage offset it gave away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.errors import OffloadError
from offload.io import PAGE, round_up
from offload.units import Unit

# In an image every storage begins at a multiple of this: at least what allocators give, so that kernels see no change.
ALIGNMENT = 256


@dataclass(frozen=True)
class Shares:
    """What becomes of one pass's inner activations: fractions of their bytes, in the order they were saved; sum 1."""

    keep: float
    cpu: float
    nvme: float
    cxl: float = 0.0

    @property
    def away(self) -> dict[str, float]:
        """The shares that leave the device, by tier."""
        shares = {"cpu": self.cpu, "cxl": self.cxl, "nvme": self.nvme}
        return {tier: share for tier, share in shares.items() if share > 0}


@dataclass(frozen=True)
class _View:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements

    @classmethod
    def of(cls, x: Tensor) -> _View:
        return cls(x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))

    def on(self, storage: torch.UntypedStorage, nbytes: int) -> Tensor:
        """The same view of a storage whose content begins at byte `nbytes`."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, nbytes // self.dtype.itemsize + self.offset, self.shape, self.stride)


def whole(x: Tensor) -> Tensor:
    """All bytes of a tensor's storage: 1-D uint8, sharing it."""
    storage = x.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage, 0, (storage.nbytes(),), (1,))


@dataclass
class _Item:
    """One storage that autograd saved."""

    nbytes: int
    held: Tensor | None  # shares the storage and its version counter; None once it has left the device
    owner: Tensor | None = None  # the boundary tensor it belongs to; such an item never moves
    at: int = -1  # where it begins in the image, -1 if it stays on the device
    kept: Tensor | None = None  # its first bytes, where only the rest left
    moved: Tensor | None = None  # all its bytes, where they stay on the device in memory of the engine's


@dataclass(frozen=True)
class _Whole:
    """A tensor kept as it is: constants of the model, and kinds that are not plain dense memory."""

    tensor: Tensor


@dataclass(frozen=True)
class _Weight:
    """A view of one of the unit's parameters; the weights it was computed with are of this generation."""

    parameter: nn.Parameter
    name: str
    generation: int
    skip: int  # bytes from the parameter's first to the view's storage origin
    view: _View


@dataclass(frozen=True)
class _Saved:
    """A view of a storage that is saved once for all its views."""

    item: _Item
    view: _View


@dataclass
class _Handle:
    """What autograd holds in a tensor's place."""

    what: _Whole | _Weight | _Saved | None  # None: given up, the unit will run again
    version: int
    changed: bool = False  # in place, after it was saved


class SavedTensors:
    """All that autograd saves in one pass of one micro-batch through one unit.

    Args:
        generation: of the unit's bound weights; None while they are not bound.
        constants: storages (by address of their object) that live through the step anyway.
        limit: bytes after which the pass is given up.
        grown: told the bytes saved so far, whenever they are more.
    """

    def __init__(
        self,
        unit: Unit,
        device: str,
        generation: Callable[[Unit], int | None],
        constants: set[int],
        shares: Shares,
        limit: int,
        grown: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self.unit = unit
        self.shares = shares
        self.dropped = False
        self.kept_bytes = 0  # on the device through the step
        self.leaving_bytes = 0  # on the device until they have left
        self.image_bytes = 0
        self.image: Tensor | None = None  # while it is back on the device
        self._device = device
        self._generation = generation
        self._constants = constants
        self._limit = limit
        self._grown = grown
        self._items: dict[int, _Item] = {}  # by storage, in the order they were saved
        self._handles: list[_Handle] = []
        self._boundary: dict[int, Tensor] = {}
        self._copied: set[int] = set()
        self._bytes = self._largest = self._head = 0
        self._weights: list[tuple[int, int, nn.Parameter, str]] = []
        self._slots: set[int] = set()
        for p, slot in zip(unit.parameters, unit.layout.params, strict=True):
            if p.numel():
                self._weights.append((p.data_ptr(), p.data_ptr() + p.nbytes, p, slot.name))
                self._slots.add(_key(p))

    @contextmanager
    def hooks(
        self, inputs: list[Any], tensors: list[Any], buffers: list[Tensor], changing: list[Tensor]
    ) -> Iterator[None]:
        """Intercept what autograd saves in the body.

        Args:
            inputs: the unit's detached arguments; `tensors` are the model's own, in the same order.
            buffers: of the unit's modules; what is saved of those in `changing` is copied at once, because the unit
                may change them in place.
        """
        for detached, own in zip(inputs, tensors, strict=True):
            if torch.is_tensor(detached) and self._is_plain(detached):
                self._boundary[_key(detached)] = own
        self._copied = {_key(x) for x in changing if self._is_plain(x)}
        self._constants = self._constants | {_key(x) for x in buffers if self._is_plain(x)} - self._copied
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._boundary.clear()

    def give_up(self) -> None:
        """Hold nothing any more: the unit will run again in backward."""
        self.dropped = True
        for handle in self._handles:
            handle.what = None
        self._handles.clear()
        self._items.clear()
        self.image = None

    # ---- after the unit's forward ----

    def settle(self, outputs: list[Any]) -> None:
        """The pass is over and `outputs` are its leaves, which are no inner activations.

        Notes which saved tensors were changed in place since: autograd must not use them.
        """
        for leaf in outputs:
            if torch.is_tensor(leaf) and self._is_plain(leaf) and _key(leaf) in self._items:
                self._items[_key(leaf)].owner = leaf
        for handle in self._handles:
            source = _source(handle.what)
            handle.changed = source is not None and source._version != handle.version
        for item in self._items.values():
            if item.owner is not None:
                item.held = None

    def owners(self) -> Iterator[int]:
        """The ids of boundary tensors that are referred to from here, once for each reference."""
        return (id(item.owner) for item in self._items.values() if item.owner is not None)

    def place(self, split_first: bool) -> dict[str, int]:
        """Lay out what leaves: returns the image's bytes for each tier, one behind the other.

        Args:
            split_first: divide the storage at the border between kept and leaving; otherwise keep it whole.
        """
        inner = self._inner()
        total = sum(item.nbytes for item in inner)
        away = sum(self.shares.away.values())
        border = round(total * self.shares.keep) if away > 1e-9 else total
        passed = at = head = 0
        for item in inner:
            begin, passed = passed, passed + item.nbytes
            item.at = -1
            if passed <= border or (begin < border and not split_first):
                continue
            if begin < border:
                head = min((border - begin) // PAGE * PAGE, item.nbytes)
            item.at = at
            at = round_up(at + item.nbytes, ALIGNMENT)
        self._head = head
        self.image_bytes = at
        self.kept_bytes = sum(round_up(item.nbytes, ALIGNMENT) for item in inner if item.at < 0) + head
        self.leaving_bytes = sum(item.nbytes for item in inner if item.at >= 0) - head
        sizes: dict[str, int] = {}
        left = at - head
        for tier, share in self.shares.away.items() if at else ():
            sizes[tier] = min(left, round((at - head) * share / away) // PAGE * PAGE)
            left -= sizes[tier]
        if at:  # the last one takes the rest; files take whole pages
            sizes[tier] = round_up(sizes[tier] + left) if tier == "nvme" else sizes[tier] + left
        return sizes

    def leave(self) -> list[tuple[int, Tensor]]:
        """The bytes that leave: (position in the image behind its kept head, 1-D uint8), in order.

        The device keeps a copy of the head; the storages are free once the caller lets these tensors go.
        """
        found: list[tuple[int, Tensor]] = []
        for item in self._inner():
            if item.at >= 0 and item.held is not None:
                data, item.held = whole(item.held), None
                head = self._head if item.at == 0 else 0
                if head:
                    item.kept = data[:head].clone()
                found.append((item.at + head - self._head, data[head:]))
        return found

    def keep_in(self, room: Tensor) -> None:
        """Copy what stays on the device whole into `room` (1-D uint8, `kept_bytes` or more) and let the storages go."""
        at = 0
        for item in self._inner():
            if item.at < 0 and item.held is not None:
                item.moved = room[at : at + item.nbytes].copy_(whole(item.held))
                item.held = None
                at += round_up(item.nbytes, ALIGNMENT)

    def arrive(self, image: Tensor) -> Tensor:
        """Use `image` (1-D uint8 on the device) for what left; returns the part of it that has to be filled."""
        self.image = image
        return image[self._head :]

    def put_head(self) -> None:
        """Copy what stayed on the device to the front of the image."""
        for item in self._items.values():
            if item.kept is not None and self.image is not None:
                self.image[: item.kept.numel()].copy_(item.kept)

    def _inner(self) -> list[_Item]:
        return [item for item in self._items.values() if item.owner is None]

    def _is_plain(self, x: Tensor) -> bool:
        """Dense memory of the device and nothing else: what can leave as bytes and come back as a view."""
        return (
            type(x) in (Tensor, nn.Parameter)
            and x.device.type == self._device
            and x.layout == torch.strided
            and not (x.is_quantized or x.is_conj() or x.is_neg())
            and x.numel() > 0
            and x.untyped_storage().nbytes() > 0
        )

    # ---- autograd's calls ----

    def _pack(self, x: Tensor) -> _Handle:
        if self.dropped:
            return _Handle(None, 0)
        what = self._what(x)
        source = _source(what)
        handle = _Handle(what, 0 if source is None else source._version)
        self._handles.append(handle)
        if self._bytes - self._largest > self._limit:  # the largest may turn out to be the unit's output
            self.give_up()
        return handle

    def _what(self, x: Tensor) -> _Whole | _Weight | _Saved:
        if not self._is_plain(x):
            return _Whole(x.detach())
        key = _key(x)
        weight = self._weight(x) if key in self._slots else None
        if weight is not None:
            return weight
        if key in self._constants:
            return _Whole(x.detach())
        if key in self._copied or key in self._slots:
            x = x.detach().clone()
            key = _key(x)
        item = self._items.get(key)
        if item is None:
            item = self._items[key] = _Item(x.untyped_storage().nbytes(), x.detach(), self._boundary.get(key))
            if item.owner is None:
                self._bytes += item.nbytes
                self._largest = max(self._largest, item.nbytes)
                self._grown(self._bytes)
        return _Saved(item, _View.of(x))

    def _weight(self, x: Tensor) -> _Weight | None:
        view, first = _View.of(x), x.untyped_storage().data_ptr()
        for begin, end, parameter, name in self._weights:
            if begin <= first + view.offset * x.itemsize < end:
                generation = self._generation(self.unit)
                assert generation is not None
                return _Weight(parameter, name, generation, first - begin, view)
        return None

    def _unpack(self, handle: _Handle) -> Tensor:
        what = handle.what
        if what is None:
            raise OffloadError(f"{self.unit.name}: backward through a graph that was given up")
        source = _source(what)
        if handle.changed or (source is not None and source._version != handle.version):
            raise OffloadError(
                f"{self.unit.name}: a tensor that its backward needs was changed in place after it was saved; plain "
                "PyTorch refuses this too"
            )
        if isinstance(what, _Whole):
            return what.tensor
        if isinstance(what, _Weight):
            generation = self._generation(self.unit)
            if generation != what.generation:
                now = "are not bound" if generation is None else f"are of generation {generation}"
                raise OffloadError(
                    f"{self.unit.name}: backward needs {what.name} of generation {what.generation}, but the unit's "
                    f"weights {now}"
                )
            storage = what.parameter.untyped_storage()
            return what.view.on(storage, what.parameter.data_ptr() - storage.data_ptr() + what.skip)
        item = what.item
        if item.owner is not None:
            return what.view.on(item.owner.untyped_storage(), 0)
        if item.held is not None:
            return what.view.on(item.held.untyped_storage(), 0)
        if item.moved is not None:
            return what.view.on(item.moved.untyped_storage(), int(item.moved.storage_offset()))
        if self.image is None:
            raise OffloadError(f"{self.unit.name}: backward needs activations that are not back on the device")
        storage = self.image.untyped_storage()
        return what.view.on(storage, self.image.data_ptr() - storage.data_ptr() + item.at)


def _source(what: _Whole | _Weight | _Saved | None) -> Tensor | None:
    """The tensor, if it is at hand, whose version tells whether what was saved is still the same."""
    if isinstance(what, _Whole):
        return what.tensor
    if isinstance(what, _Saved):
        return what.item.held if what.item.held is not None else what.item.owner
    return None


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
