"""Live tensor bytes and floating point operations of code run on fake tensors: what a kernel sequence would allocate.

After torch's own `MemTracker`: every storage that an operator returns is counted once and until it dies. Temporaries
inside a kernel do not show; `memory.FRAMEWORK_MARGIN` stands for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """While active, `live` is the bytes of all storages made by operators, `peak` its maximum since `mark`.

    Values that fake tensors do not have (`bool(mask.all())`) read as zero, the branch that skips nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def mark(self) -> int:
        """Start a new peak from here; returns the live bytes."""
        self.peak = self.live
        return self.live

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors' storages, nor any view of them."""
        self._known.update(t.untyped_storage()._cdata for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return _zero(args[0].dtype)
        if func is _aten._grouped_mm.default:  # its shape function refuses what the CPU computes (float32)
            out = args[0].new_empty(_grouped_shape(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs")))
        else:
            out = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, out)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, nbytes).atexit = False

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def _zero(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False
    return 0.0 if dtype.is_floating_point else 0


def _grouped_shape(a: Tensor, b: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """Output shape of a grouped matrix product: groups are slices of a dimension that both or one of the two has."""
    if a.dim() == 2 and b.dim() == 2:
        return (offsets.shape[0] if offsets is not None else 1, a.shape[0], b.shape[1])
    if a.dim() == 3 and b.dim() == 3:
        return (a.shape[0], a.shape[1], b.shape[2])
    return (a.shape[-2], b.shape[-1])


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    packet = getattr(func, "_overloadpacket", None)
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:  # not in torch's registry
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is _aten._grouped_mm:  # every row meets one group's matrix; contracted over the shared dimension
        batch = args[0].shape[0] if args[0].dim() == 3 and args[1].dim() == 3 else 1
        return 2 * batch * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0
