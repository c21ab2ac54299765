"""The peak model: every byte a run takes, by tier and category, from the workload and where its state lives.

What the engine reserves (`reserve`, `home_bytes`, `gradient_home`) is exact. What the framework allocates inside a unit
is the traced peak of one micro-batch times `FRAMEWORK_MARGIN`, the one place where measurement corrects the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from offload.planner.plan import Buffers, UnitProfile, Workload

PAGE = 4096
MIB = 1 << 20

STAGING_BYTES = 8 * MIB
STAGING_COUNT = 4
CHUNK_ELEMENTS = 2 * MIB  # elements of one optimizer chunk
CHUNK_BYTES_PER_ELEMENT = 16  # param, master, both moments, gradient
UPDATE_COUNT = 3  # read ahead, update, write behind
PROGRAM_BYTES = 64 * MIB  # interpreter objects, thread stacks, tape and request objects of the run itself
STRIPE_BYTES = 8 * MIB  # the store's stripe: each path may hold one more than its exact share

# The traced peak of a unit was compared with the real one (resident memory, its maximum reset before each pass) for
# llama, qwen3, gemma3, gpt2, gpt-neox and qwen3-moe, hidden 256 to 4096, 256 to 2048 tokens, bfloat16 and float32 on
# the CPU. Real minus traced was 2 to 25 MB, the larger part a constant: oneDNN keeps code and scratch for every shape
# it has seen (about 0.7 MB each in bfloat16). What remained was at most 5 %. Two conditions, which the engine sets up:
# - glibc gives tensors of MMAP_THRESHOLD bytes and more back at once (mallopt M_MMAP_THRESHOLD and M_TRIM_THRESHOLD;
#   the default, which adapts, took up to 4 times the traced peak through fragmentation);
# - oneDNN's caches hold at most KERNEL_CACHE_CAPACITY shapes (ONEDNN_PRIMITIVE_CACHE_CAPACITY, LRU_CACHE_CAPACITY;
#   without them, experts' ever new shapes grew to 0.9 GB).
# CUDA's numbers are not measured yet: the caching allocator rounds blocks up, and cuBLAS keeps a workspace.
MMAP_THRESHOLD = 1 * MIB
KERNEL_CACHE_CAPACITY = 32
FRAMEWORK_MARGIN = {"cpu": 1.05, "cuda": 1.10}
FRAMEWORK_FIXED = {("cpu", "bfloat16"): 40 * MIB, ("cpu", "float32"): 16 * MIB}
FRAMEWORK_FIXED |= {("cuda", "bfloat16"): 64 * MIB, ("cuda", "float32"): 64 * MIB}


def round_up(nbytes: int, multiple: int = PAGE) -> int:
    """`nbytes` rounded up to a multiple."""
    return -(-nbytes // multiple) * multiple


def weight_bytes(unit: UnitProfile, w: Workload) -> int:
    """The unit's trainable and frozen weights in the compute dtype."""
    return (unit.trainable + unit.frozen) * w.itemsize


def gradient_bytes(unit: UnitProfile, w: Workload) -> int:
    """One step's summed gradient of the unit."""
    return unit.trainable * w.gradient_itemsize


def home_bytes(unit: UnitProfile, w: Workload) -> dict[str, int]:
    """Bytes by role of the unit's state in its home (RAM, or one side of its store extents); each buffer whole pages.

    Roles: param, frozen, master (bfloat16 only: the low half of the float32 value), exp_avg, exp_avg_sq.
    """
    sizes = {"param": unit.trainable * w.itemsize, "frozen": unit.frozen * w.itemsize}
    if w.dtype == "bfloat16":
        sizes["master"] = unit.trainable * 2
    sizes["exp_avg"] = sizes["exp_avg_sq"] = unit.trainable * 4
    return {role: round_up(n) for role, n in sizes.items() if n}


def gradient_home(unit: UnitProfile, w: Workload) -> int:
    """Bytes of the unit's gradient while it waits for the global norm; 0 without clipping."""
    return round_up(gradient_bytes(unit, w)) if w.clipping else 0


def store_bytes(unit: UnitProfile, w: Workload) -> int:
    """Bytes of the unit's durable extents: two sides of everything that is updated, one of what is frozen."""
    return sum(n if role == "frozen" else 2 * n for role, n in home_bytes(unit, w).items())


def is_large(unit: UnitProfile, w: Workload) -> bool:
    """Whether the unit is streamed through the "large" slot because a block slot is too small for its weights."""
    return unit.kind != "resident" and weight_bytes(unit, w) > _block_slot(w)


def _block_slot(w: Workload) -> int:
    return max((weight_bytes(u, w) for u in w.units if u.kind in ("block", "other")), default=0)


def reserve(w: Workload, block_slots: int = 2) -> tuple[Buffers, ...]:
    """The buffers reserved at start-up, homes not included. Names that need no bytes are left out.

    weights.block, weights.large, gradients.block, gradients.large, gradients.held/<unit> (one per held unit), resident
    in the gpu tier; staging, landing, update in the cpu tier. A unit uses the "large" slots exactly if `is_large`.
    """
    streamed = [u for u in w.units if u.kind != "resident"]
    large = [u for u in streamed if is_large(u, w)]
    small = [u for u in streamed if not is_large(u, w)]

    def widest(units: list[UnitProfile], size: Callable[[UnitProfile, Workload], int]) -> int:
        return round_up(max((size(u, w) for u in units), default=0))

    def unheld(units: list[UnitProfile]) -> list[UnitProfile]:
        return [u for u in units if not u.held]

    resident = sum(
        round_up(weight_bytes(u, w)) + round_up(gradient_bytes(u, w)) for u in w.units if u.kind == "resident"
    )
    most_trainable = max((u.trainable for u in w.units), default=0)
    chunk = min(CHUNK_ELEMENTS, round_up(most_trainable))
    buffers = [
        Buffers("weights.block", "gpu", block_slots, widest(small, weight_bytes)),
        Buffers("weights.large", "gpu", 1, widest(large, weight_bytes)),
        Buffers("gradients.block", "gpu", 2, widest(unheld(small), gradient_bytes)),
        Buffers("gradients.large", "gpu", 1, widest(unheld(large), gradient_bytes)),
        *(Buffers(f"gradients.held/{u.name}", "gpu", 1, round_up(gradient_bytes(u, w))) for u in streamed if u.held),
        Buffers("resident", "gpu", 1, resident),
        Buffers("staging", "cpu", STAGING_COUNT, STAGING_BYTES),
        Buffers("landing", "cpu", 1, round_up(4 * most_trainable)),
        Buffers("update", "cpu", UPDATE_COUNT, CHUNK_BYTES_PER_ELEMENT * chunk),
    ]
    return tuple(b for b in buffers if b.nbytes)


def activation_bytes(w: Workload) -> int:
    """Boundary activations and shared tensors of all micro-batches at the end of forward."""
    return w.micro_batches * (sum(u.boundary_bytes for u in w.units) + w.shared_bytes)


def framework_bytes(w: Workload) -> int:
    """The framework's temporaries beyond `activation_bytes`, at their largest over the step.

    Of the units' workspaces in backward, each with the boundary gradients of all micro-batches that exist beside it
    (one more than M: a unit's input gradient is made before its output gradient goes), and in forward, where the
    boundaries of later units do not exist yet, so that only what exceeds them counts.
    """
    if not w.units:
        return FRAMEWORK_FIXED[w.device, w.dtype]
    m = w.micro_batches
    per_visit = [u.boundary_bytes // max(1, u.visits) for u in w.units]
    boundary_gradients = (m + 1) * max(per_visit)
    backward = max(u.workspace_backward for u in w.units) + boundary_gradients
    forward = max(u.workspace_forward for u in w.units)
    return round(max(backward, forward) * FRAMEWORK_MARGIN[w.device]) + FRAMEWORK_FIXED[w.device, w.dtype]


def lower_bound(w: Workload) -> int:
    """The least any layout of the device arena needs: one unit's weights and gradient beside what lives all through."""
    always = sum(weight_bytes(u, w) + gradient_bytes(u, w) for u in w.units if u.kind == "resident")
    always += sum(gradient_bytes(u, w) for u in w.units if u.held and u.kind != "resident")
    return always + max(
        (weight_bytes(u, w) + (0 if u.held else gradient_bytes(u, w)) for u in w.units if u.kind != "resident"),
        default=0,
    )


def peaks(
    w: Workload,
    buffers: Collection[Buffers],
    state_in_ram: Collection[int] = (),
    gradients_in_ram: Collection[int] = (),
    nvme_paths: int = 1,
) -> dict[str, dict[str, int]]:
    """Peak bytes by tier and category. The index sets name the units with state, and with gradients, in RAM.

    On device "cpu" the cpu tier has a category "device": everything of the gpu tier, which is then RAM.
    """
    gpu: dict[str, int] = {}
    cpu: dict[str, int] = {}
    for b in buffers:
        tier = gpu if b.tier == "gpu" else cpu
        category = b.name.split(".")[0]
        tier[category] = tier.get(category, 0) + b.total
    gpu["activations"] = activation_bytes(w)
    gpu["framework"] = framework_bytes(w)
    cpu["program"] = PROGRAM_BYTES
    cpu["state"] = sum(sum(home_bytes(w.units[i], w).values()) for i in state_in_ram)
    cpu["gradient homes"] = sum(gradient_home(w.units[i], w) for i in gradients_in_ram)
    if w.device == "cpu":
        cpu["device"] = sum(gpu.values())
    nvme = {
        "state": sum(store_bytes(u, w) for u in w.units),
        # reserved wherever gradients wait today, so that a run can go on with another RAM budget
        "gradients": sum(gradient_home(u, w) for u in w.units),
    }
    nvme["striping"] = STRIPE_BYTES * nvme_paths if nvme_paths > 1 else 0
    return {
        tier: {category: n for category, n in sizes.items() if n}
        for tier, sizes in {"gpu": gpu, "cpu": cpu, "cxl": {}, "nvme": nvme}.items()
    }
