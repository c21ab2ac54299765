"""The planner's nouns: what is to be run, what there is to run it on, the answer. Plain data; sizes are bytes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

TIERS = ("gpu", "cpu", "cxl", "nvme")
ROLES = ("param", "master", "exp_avg", "exp_avg_sq", "grad", "activation")
LANES = ("compute", "h2d", "d2h", "nvme_read", "nvme_write", "optimizer")

COMPUTE_DTYPES = ("bfloat16", "float32")
RATES = ("h2d", "d2h", "ram", "nvme_read", "nvme_write", "adamw_parameters_per_second", "adamw_split_ratio", "cxl")
RATES_TOGETHER = ("link_duplex", "nvme_duplex")
FROM_ZERO = {"adamw_device": "parameters per second", "cxl_latency": "seconds"}
SPLIT_RATIO = 0.45  # stock operations, measured on two cores: 0.8 and 1.9 G parameters/s at one thread
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class UnitProfile:
    """What one unit holds and costs. Costs are of one micro-batch, summed over the unit's visits in one forward."""

    name: str
    kind: str  # "embedding" | "block" | "head" | "resident" | "other"
    parameters: int  # elements, alignment padding not counted
    trainable: int  # elements of the trainable flat space, padding counted
    frozen: int  # elements of the frozen flat space, padding counted
    held: bool = False  # tied, or visited more than once per direction: its gradient slot lives through all of backward
    forward_flops: int = 0
    boundary_bytes: int = 0  # outputs of the unit, kept until its backward
    workspace_forward: int = 0  # peak bytes of framework temporaries, forward without grad
    workspace_backward: int = 0  # the same for recompute + backward, fresh parameter gradients (and the loss) included
    visits: int = 1  # times the unit's weights are needed in one forward pass
    kept: bool = False  # runs with grad in the forward and is not recomputed: the last visit, up to the loss
    saved: tuple[int, ...] = ()  # bytes of every tensor autograd saves inside the unit, in the order it packs them
    forward_seconds: float = 0.0  # measured on this machine; 0 when only `forward_flops` is known
    backward_seconds: float = 0.0  # the same for backward alone, the loss included
    workspace_kept: int = 0  # peak bytes of a backward that nothing is run again for, beside `saved`; 0: not known
    workspace_graph: int = 0  # peak bytes of a forward with grad, all that autograd saves in it included; 0: not known
    workspace_unsaved: int = 0  # the most bytes in such a forward that autograd has not saved yet, or never does

    @cached_property
    def saved_bytes(self) -> int:
        """What one micro-batch keeps alive from forward to backward when the unit is not recomputed."""
        return sum(self.saved)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for units that cost the same: everything but the name."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "name")


@dataclass
class UnitCost:
    """One unit's costs, as the fields of the same names in `UnitProfile`."""

    forward_flops: int = 0
    boundary_bytes: int = 0
    workspace_forward: int = 0
    workspace_backward: int = 0
    visits: int = 0
    kept: bool = False
    saved: tuple[int, ...] = ()
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    workspace_kept: int = 0
    workspace_graph: int = 0
    workspace_unsaved: int = 0


@dataclass(frozen=True)
class Profile:
    """Costs by unit name; the bytes per micro-batch that live around units; and notes on how they were found.

    `logits_bytes`: of a micro-batch's logits in the compute dtype, where head and loss are computed together; they are
    part of the last unit's workspaces. 0 where the model's own loss takes the logits whole.
    """

    costs: dict[str, UnitCost]
    shared_bytes: int
    notes: tuple[str, ...] = ()
    logits_bytes: int = 0


@dataclass(frozen=True)
class ZerothOrder:
    """What a zeroth-order step has in place of gradients and optimizer state.

    `roles` are the stored roles of a unit's trainable elements: (name, bytes for every `per` elements, `per`, whether a
    step writes it). `forwards` passes of every micro-batch go through a unit while its weights are on the device, of
    which `together` in one walk over the units; `walks` is how often a step walks over them.
    A step perturbs and updates a share `active` of the units.
    """

    roles: tuple[tuple[str, int, int, bool], ...]
    forwards: int = 2
    together: int = 2
    walks: int = 1
    samples: int = 1
    active: float = 1.0


PROGRAM_BYTES = 62 << 20  # where a run's process was not looked at: `planner/memory.py` says of what


@dataclass(frozen=True)
class Workload:
    """One optimizer step: `micro_batches` passes of `micro_batch` rows of `sequence_length` tokens through `units`."""

    units: tuple[UnitProfile, ...]
    micro_batches: int
    micro_batch: int
    sequence_length: int
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    clipping: bool = True
    commit_every: int | Literal["auto"] = "auto"
    device: Literal["cpu", "cuda"] = "cuda"
    steps: int = 1
    shared_bytes: int = 0  # per micro-batch: what the model computes around units and keeps (masks, rotary tables)
    notes: tuple[str, ...] = ()  # how the profile was made, where that matters
    activations: Literal["recompute", "plan"] = "recompute"  # "plan": keep, swap or recompute, whatever is fastest
    zo: ZerothOrder | None = None  # forward passes only; None: back-propagation and AdamW
    logits_bytes: int = 0  # as in `Profile`, at one chunk
    head_chunks: int | Literal["auto"] = "auto"  # parts of a micro-batch's rows for head and loss
    program_bytes: int = PROGRAM_BYTES  # of RAM: what a run's process takes that is no tensor, beyond its footprint

    def __post_init__(self) -> None:
        for name in ("micro_batches", "micro_batch", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"Workload.{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"Workload.dtype is {self.dtype!r}; accepted: {', '.join(ITEMSIZE)}")
        if self.commit_every != "auto" and self.commit_every < 1:
            raise ValueError(
                f"Workload.commit_every is {self.commit_every}; accepted: auto or a number of steps from 1"
            )
        if self.activations not in ("recompute", "plan"):
            raise ValueError(f"Workload.activations is {self.activations!r}; accepted: recompute, plan")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"Workload.device is {self.device!r}; accepted: cpu, cuda")
        if len({u.name for u in self.units}) != len(self.units):
            raise ValueError("Workload.units has two units of one name")

    @cached_property
    def itemsize(self) -> int:
        """Bytes per element of the compute dtype."""
        return ITEMSIZE[self.dtype]

    @cached_property
    def widest_block(self) -> int:
        """Elements of the largest unit among the blocks: what a block slot is made for.

        Zeroth-order steps need two slots of every kind, so that sharing them takes less than a kind of their own.
        """
        kinds = ("block", "other", "embedding", "head") if self.zo else ("block", "other")
        return max((u.trainable + u.frozen for u in self.units if u.kind in kinds), default=0)

    @cached_property
    def gradient_itemsize(self) -> int:
        """Bytes per element of a step's summed gradient: compute dtype for one micro-batch, else float32."""
        return self.itemsize if self.micro_batches == 1 else 4

    def in_chunks(self, count: int) -> Workload:
        """The workload with head and loss in `count` chunks of rows: of the logits only a chunk exists at a time."""
        before = 1 if self.head_chunks == "auto" else self.head_chunks
        freed = -(-self.logits_bytes // before) - -(-self.logits_bytes // count)
        units = tuple(
            replace(
                u,
                workspace_forward=max(0, u.workspace_forward - freed),
                workspace_backward=max(0, u.workspace_backward - freed),
            )
            if u.kept
            else u
            for u in self.units
        )
        return replace(self, units=units, head_chunks=count)

    @cached_property
    def alike(self) -> tuple[int, ...]:
        """Of each unit the number of the first one that costs the same."""
        first: dict[object, int] = {}
        return tuple(first.setdefault(u.key, i) for i, u in enumerate(self.units))

    @cached_property
    def worked_out(self) -> dict[Any, Any]:
        """What follows from the workload, kept for the next time it is asked for: planning asks thousands of times."""
        return {}

    @property
    def tokens(self) -> int:
        """Tokens per step, padding counted."""
        return self.micro_batches * self.micro_batch * self.sequence_length


@dataclass(frozen=True)
class Hardware:
    """Capacities in bytes and rates in units per second. `source` says where each number is from."""

    name: str
    gpu_bytes: int  # 0 without a GPU
    cpu_bytes: int  # RAM that a run may take
    matrix_flops: dict[str, float]  # attainable floating point operations per second, by compute dtype
    h2d: float  # bytes per second, host to device
    d2h: float
    ram: float  # bytes copied per second within RAM
    nvme_read: float  # bytes per second, all paths together
    nvme_write: float
    adamw_parameters_per_second: float  # fused float32 AdamW on the CPU
    adamw_split_ratio: float = SPLIT_RATIO  # rate of AdamW on the split bfloat16 state over that
    adamw_device: float = 0.0  # parameters per second of AdamW on the device, any state; 0: it is not offered there
    link_duplex: float = 2.0  # copies both ways at once, in units of one way's rate: 1 half duplex, 2 full duplex
    nvme_duplex: float = 1.0  # the same for reads and writes; half duplex fits published SSD systems
    cores: int = 2  # threads that compute, copies and the optimizer share on device "cpu"
    cxl_bytes: int = 0  # memory of NUMA nodes without CPUs
    cxl: float = 1.2e10  # bytes per second to and from it, all nodes together
    cxl_latency: float = 0.0  # seconds of each transfer beyond its bytes
    source: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"hardware: name is {self.name!r}; it must be a text")
        for key in RATES:
            _positive(key, getattr(self, key), self.name)
        for key in RATES_TOGETHER:
            _positive(key, getattr(self, key), self.name)
            if not 1.0 <= getattr(self, key) <= 2.0:
                raise ValueError(f"hardware {self.name}: {key} is {getattr(self, key)!r}; accepted: 1 to 2")
        for key in ("gpu_bytes", "cpu_bytes", "cxl_bytes", "cores"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"hardware {self.name}: {key} is {value!r}; it must be a whole number of bytes from 0")
        for key, unit in FROM_ZERO.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"hardware {self.name}: {key} is {value!r}; accepted: {unit} from 0")
        if not isinstance(self.matrix_flops, Mapping) or set(self.matrix_flops) != set(COMPUTE_DTYPES):
            raise ValueError(
                f"hardware {self.name}: matrix_flops is {self.matrix_flops!r}; give {' and '.join(COMPUTE_DTYPES)}"
            )
        for dtype, value in self.matrix_flops.items():
            _positive(f"matrix_flops.{dtype}", value, self.name)

    def cxl_seconds(self, nbytes: float) -> float:
        """Seconds of one transfer to or from CXL memory."""
        return nbytes / self.cxl + self.cxl_latency if nbytes else 0.0

    def matrix_rate(self, dtype: str) -> float:
        """Floating point operations per second in a compute dtype; the units of bfloat16 also do float16."""
        return self.matrix_flops["bfloat16" if dtype == "float16" else dtype]


def _positive(key: str, value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"hardware {name}: {key} is {value!r}; it must be a number above 0")


@dataclass(frozen=True)
class Budgets:
    """Hard limits in bytes. On device "cpu" the `cpu` limit includes the device arena that `gpu` limits."""

    gpu: int
    cpu: int
    cxl: int = 0
    nvme: tuple[tuple[str, int], ...] = ()  # (path, bytes); striped in proportion to size

    def by_tier(self) -> dict[str, int]:
        """Bytes per tier, the NVMe paths summed."""
        return {"gpu": self.gpu, "cpu": self.cpu, "cxl": self.cxl, "nvme": sum(size for _, size in self.nvme)}


@dataclass(frozen=True)
class Buffers:
    """`count` buffers of `nbytes` each that the engine reserves in `tier` at start-up."""

    name: str
    tier: str
    count: int
    nbytes: int

    @property
    def total(self) -> int:
        return self.count * self.nbytes

    @property
    def category(self) -> str:
        """What it is for, as `Plan.categories` and the engine's ledger call it."""
        kind, _, what = self.name.partition(".")
        return "swapped activations" if kind == "activations" and what != "kept" else kind


@dataclass(frozen=True)
class UnitPlan:
    """Where one unit's roles live between uses, and what happens to its activations (fractions that sum to 1).

    activations: of what autograd saves inside the unit. "recompute" is a multiple of 1/M: the first round(recompute M)
    micro-batches are run again in backward. Of each other micro-batch the saved tensors (weights and the unit's inputs
    are references, not saved), in the order autograd packs them, are split by bytes: keep/(1-recompute) stay on the
    device, swap_cpu, swap_cxl and swap_nvme, each over (1-recompute), go to RAM, CXL memory and NVMe; a tensor at a
    border is split by rows.
    placement["activation"] is where the unit's outputs wait for backward: gpu, cpu, cxl or nvme.

    placement["grad"] is the tier where a step's gradient waits for its update: "cpu" or "cxl" (a home there) or "nvme"
    (spilled) when clipping, "gpu" (only ever in its slot) without clipping or without trainable parameters. A
    zeroth-order plan has the roles that are stored, and no gradient.
    A unit whose state is in "gpu" has all roles there: it is never streamed, and AdamW runs on the device. Its weights
    and state are in the buffer `state.<unit>`, its gradient when clipping in `gradients.held/<unit>`.

    framework: bytes that the framework may take while the unit runs, {"forward", "backward"}, and how much of "forward"
    is room for saved tensors, those of earlier passes on their way out among them ("saved"; none if left out).
    """

    name: str
    parameters: int
    placement: dict[str, str]
    activations: dict[str, float]
    framework: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Advice:
    """A change of machine or settings, and tokens per second with it over those without; planned, not estimated."""

    change: str
    speedup: float


@dataclass(frozen=True)
class Plan:
    """The planner's answer; `plan.json` is `to_json()`."""

    fits: bool
    budget_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    categories: dict[str, dict[str, int]]  # the peak of each tier, by what it is for
    step_seconds: float
    tokens_per_second: float
    lane_seconds: dict[str, float]
    busiest_lane: str
    solver: dict[str, Any]  # name, status, gap (None if not known), seconds
    units: tuple[UnitPlan, ...]
    layout: dict[str, Any]  # `Arena.to_json`; one_unit_bytes: the least any plan needs on the device
    buffers: tuple[Buffers, ...]
    commit_every: int
    spill_gradients: bool  # some unit's gradients wait on nvme
    hardware: str
    stall_seconds: dict[str, float] = field(default_factory=dict)  # of a step, compute waiting for each lane
    advice: tuple[Advice, ...] = ()  # what would make the step faster, the most helpful first
    advised: bool = False  # whether it was looked for
    notes: tuple[str, ...] = ()
    shortfall_bytes: dict[str, int] = field(default_factory=dict)
    suggestions: tuple[str, ...] = ()
    head_chunks: int = 0  # head and loss together, in so many chunks of rows; 0: the model's own loss, logits whole

    def unit(self, name: str) -> UnitPlan:
        """The plan of the unit called `name`; KeyError if there is none."""
        for unit in self.units:
            if unit.name == name:
                return unit
        raise KeyError(f"the plan has no unit {name!r}")

    def buffer(self, name: str) -> Buffers | None:
        """The reserved buffers called `name`, None when the plan needs none of them."""
        return next((b for b in self.buffers if b.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; `from_json` gives back an equal Plan."""
        out = asdict(self)
        for name in ("units", "buffers", "advice", "notes", "suggestions"):
            out[name] = list(out[name])
        if self.fits:
            del out["shortfall_bytes"], out["suggestions"]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises ValueError naming a missing or unknown key."""
        values = dict(data)
        try:
            values["units"] = tuple(UnitPlan(**u) for u in values["units"])
            values["buffers"] = tuple(Buffers(**b) for b in values["buffers"])
            values["advice"] = tuple(Advice(**a) for a in values.get("advice", ()))
            values["notes"] = tuple(values.get("notes", ()))
            values["suggestions"] = tuple(values.get("suggestions", ()))
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a plan of this version: {error}") from error
