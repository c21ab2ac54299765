"""What a run holds from start to end: the store, the homes in RAM and CXL memory, and every buffer the plan reserved.

`create` makes them for a new run and brings the weights in; `reopen` finds them again at the last committed step.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offload import device_home, models, oom, zo_state
from offload.activation_places import Tier, activation_tiers
from offload.arena import DeviceArena
from offload.checkpoint_source import CheckpointSource
from offload.config import Config
from offload.device import Device, open_device
from offload.errors import ConfigError, OffloadError
from offload.io import Extent, Ledger, Ring, Store, StorePath
from offload.memory_record import MemoryRecord
from offload.planner.activation_bytes import kept_room
from offload.planner.drives import bandwidths
from offload.prepare import Prepared
from offload.run_place import IO_CHOICE
from offload.rundir import RunDirectory
from offload.slot_loads import SlotLoads
from offload.state import States, extents
from offload.trace import Trace
from offload.weights import TensorSource, open_weights
from offload.zo_pieces import Pieces
from offload.zo_state import ZoStates

# Seconds a lane waits for a buffer or for weights before it reports what hangs. The store watches the device itself.
TIMEOUT = 600.0
_ARCHITECTURE, _BUFFERS = "architecture", "buffers.safetensors"


@dataclass
class Resources:
    """Everything large that a run reserved. `close` gives it back; it is made by `create` or `reopen`."""

    store: Store
    ledger: Ledger
    device: Device
    trace: Trace
    record: MemoryRecord
    states: States
    weight_slots: dict[str, list[Tensor]]
    gradient_slots: dict[str, list[Tensor]]
    resident: Tensor | None
    staging: Ring
    landing: Ring | None  # None where the device is host memory, and without gradients
    update: Ring
    device_scratch: Tensor | None  # of AdamW on the device
    activation_tiers: dict[str, Tier]
    activation_staging: list[Tensor]
    kept_room: int
    kept_memory: Tensor | None
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    pieces: Pieces | None  # zeroth-order runs: the arithmetic on a unit's slot
    _stack: ExitStack

    def abort(self) -> None:
        """After a failure, before the lanes are stopped: end all transfers and commits, and fail whoever waits.

        No memory is freed: the store must never read a buffer that is gone and commit what it found there.
        """
        self.store.close()
        for ring in (self.staging, self.landing, self.update):
            if ring is not None:
                ring.cancel()

    def write_homes(self) -> None:
        """Write all state that is not only in the store to it and publish it, between two commits that are due."""
        self.states.write_homes()
        device_home.write(self.states.units, self.staging, self.device, TIMEOUT)

    def close(self) -> None:
        """Give files, locks and memory back; the lanes must have stopped."""
        self._stack.close()
        self.weight_slots.clear()
        self.gradient_slots.clear()
        self.activation_staging.clear()
        self.resident = self.kept_memory = self.device_scratch = None


@contextmanager
def create(prepared: Prepared, run: RunDirectory) -> Iterator[Resources]:
    """Reserve everything for a new run, stream the weights into the store and commit them as step 0.

    Closed again if the body or the set-up fails; otherwise the caller owns what was yielded.
    """
    source = _source(prepared)
    try:
        store = Store.create(
            _store_paths(prepared),
            run.store_name,
            _extents(prepared),
            backend=prepared.config.memory.backend,
            record=run.path / IO_CHOICE,
            timeout=prepared.config.memory.io_timeout,
        )
        with _closed_on_error(_reserve(prepared, store)) as resources:
            if not _described(prepared.config):
                _save_architecture(prepared, run.path)
            names = {name: i for i, name in enumerate(source.order)}
            order = sorted(prepared.units, key=lambda u: (u.resident, min(names[p.name] for p in u.layout.params)))
            resources.states.populate(source.read, order, resources.update, resources.staging, TIMEOUT)
            store.commit({"step": 0, "parameter_steps": [0, {}], "buffers": encode_buffers(prepared.model)})
            _load_on_device(resources)
            resources.trace.forget()
            yield resources
    finally:
        source.close()


@contextmanager
def reopen(prepared: Prepared, run: RunDirectory) -> Iterator[Resources]:
    """Reserve everything for a run that exists and fill the homes from its last committed step."""
    # sizes come from the manifest
    paths = [StorePath(Path(p.path), 1, tbw=p.tbw) for p in run.store_paths]
    memory = prepared.config.memory
    store = Store.open(
        paths, run.store_name, backend=memory.backend, record=run.path / IO_CHOICE, timeout=memory.io_timeout
    )
    missing = [e.key for e in _extents(prepared) if store.extents.get(e.key) != e]
    if missing:
        store.close()
        raise OffloadError(
            f"the store of {run.path} has no extent {missing[0]} of the size this model needs; resume with the model "
            "and batch sizes the run was started with"
        )
    with _closed_on_error(_reserve(prepared, store)) as resources:
        resources.states.load_homes()
        _load_on_device(resources)
        decode_buffers(prepared.model, store.meta["buffers"])
        resources.trace.forget()
        yield resources


def _load_on_device(held: Resources) -> None:
    loads = SlotLoads(held.device, held.staging, held.trace, TIMEOUT)
    device_home.load(held.states.units, loads.load)


@contextmanager
def _closed_on_error(resources: Resources) -> Iterator[Resources]:
    try:
        yield resources
    except BaseException:
        resources.close()
        raise


def _reserve(prepared: Prepared, store: Store) -> Resources:
    plan, ledger, trace = prepared.plan, Ledger(), Trace()
    with ExitStack() as stack, oom.explained(prepared, ledger, trace):
        device = open_device(prepared.device, prepared.config.memory.lock)  # before its peaks are recorded
        planned = plan.peak_bytes["cpu"] + plan.peak_bytes["cxl"]  # emulated or not, it is part of the process too
        device.heap.allow(planned, plan.categories["gpu"].get("framework", 0))
        record = stack.enter_context(MemoryRecord(ledger, trace, prepared.device))
        stack.callback(store.close)
        memory = stack.enter_context(ExitStack())  # host memory, freed once the device has let go of its pages
        stack.callback(device.close)
        trace.clock = device.clock

        def ring(name: str) -> Ring:
            wanted = plan.buffer(name)
            if wanted is None:
                raise ConfigError(f"the plan has no {name} buffer: the model has nothing to train (requires_grad)")
            made = Ring(wanted.count, wanted.nbytes, ledger, "cpu", name)
            memory.callback(made.close)
            for chunk in made.tensors:
                device.pin(chunk)
            return made

        rings = {name: ring(name) for name in ("staging", "update")}
        landing = None if device.in_host_memory or prepared.zo else ring("landing")
        described = (
            prepared.units,
            plan,
            store,
            prepared.dtype,
            prepared.gradient_dtype,
            prepared.workload.clipping,
            ledger,
            device.pin,
            prepared.tiers,
        )
        states = ZoStates(prepared.zo, *described) if prepared.zo else States(*described)
        if prepared.zo:
            stack.callback(prepared.zo.close)
        memory.callback(states.close)
        activations = activation_tiers(
            plan, prepared.tiers, store, rings["staging"], device, ledger, trace, TIMEOUT, memory
        )
        stack.callback(store.close)  # first of all: nothing may still be written from what follows
        for extent in store.extents.values():
            ledger.add("nvme", extent.key.split("/")[1], extent.padded * extent.sides)
        slots = DeviceArena(plan, device, ledger).slots
        kept = slots("activations.kept")
        gradient_slots = {group: slots(f"gradients.{group}") for group in ("block", "large")}
        for unit in prepared.units:
            if held := slots(f"gradients.held/{unit.name}"):
                gradient_slots[f"held/{unit.name}"] = held
        if not prepared.zo:
            device_home.place(states.units, plan, slots)
        resident = None
        for unit in prepared.units:
            if unit.resident:
                whole = slots("resident")[0]
                if prepared.zo:
                    resident = whole
                    continue
                weights = -(-states.units[unit.index].weight_bytes // 4096) * 4096
                resident, gradient_slots["resident"] = whole[:weights], [whole[weights:]]
        store.observer = _observer(trace)
        return Resources(
            store,
            ledger,
            device,
            trace,
            record,
            states,
            {group: slots(f"weights.{group}") for group in ("block", "large")},
            gradient_slots,
            resident,
            rings["staging"],
            landing,
            rings["update"],
            next(iter(slots("update.device")), None),
            activations,
            slots("activations.staging"),
            kept[0].numel() if kept else _kept_room(prepared),
            kept[0] if kept else None,
            prepared.dtype,
            prepared.gradient_dtype,
            prepared.zo,
            stack.pop_all(),
        )


def _kept_room(prepared: Prepared) -> int:
    """Bytes of inner activations that the plan leaves on the device as the framework made them."""
    shares = [(unit, prepared.plan.unit(unit.name).activations["keep"]) for unit in prepared.workload.units]
    return sum(kept_room(unit, keep * prepared.workload.micro_batches) for unit, keep in shares)


def _observer(trace: Trace) -> Any:
    def observe(kind: str, begin: float, end: float, nbytes: int, label: str) -> None:
        trace.add("nvme_read" if kind == "read" else "nvme_write", label, begin, end, nbytes)

    return observe


def _extents(prepared: Prepared) -> list[Extent]:
    if prepared.zo:
        return zo_state.extents(prepared.units, prepared.zo)
    return extents(prepared.units, prepared.dtype, prepared.gradient_dtype, prepared.workload.clipping)


def _store_paths(prepared: Prepared) -> list[StorePath]:
    """The store's paths with the sizes that were planned with (`auto` resolved)."""
    sizes, paths = dict(prepared.store_budgets), prepared.config.store_paths()
    rates: Sequence[float | None] = bandwidths([p.path for p in paths]) or [None] * len(paths)
    return [StorePath(Path(p.path), sizes[p.path], rate, p.tbw) for p, rate in zip(paths, rates, strict=True)]


# ---- where the weights come from ----


def _described(cfg: Config) -> bool:
    """Whether the configuration alone says which model this is."""
    return cfg.model is not None and (cfg.model.path is not None or cfg.model.architecture is not None)


def _source(prepared: Prepared) -> TensorSource:
    """The weights: the given model's own, the checkpoint's, or fresh random ones. Validated before anything streams."""
    cfg = prepared.config
    directory = models.locate(cfg.model) if cfg.model is not None and cfg.model.path is not None else None
    source = open_weights(prepared.model, directory, cfg.train.seed)
    if isinstance(source, CheckpointSource):
        source.load_buffers()
    return source


def _save_architecture(prepared: Prepared, run: Path) -> None:
    """Keep what is needed to build a given model again on resume: its configuration, class, dtype and buffers."""
    model = prepared.model
    if not hasattr(model, "config") or hasattr(model, "peft_config"):
        return
    config = models.original_config(model)
    config.architectures = [type(model).__name__]
    config.dtype = prepared.dtype
    config.save_pretrained(run / _ARCHITECTURE)
    buffers = {name: b.detach().cpu().clone() for name, b in model.named_buffers()}
    save_file(buffers, run / _ARCHITECTURE / _BUFFERS)


def rebuild_model(run: RunDirectory) -> nn.Module | None:
    """The model of a run that began with one its configuration does not describe, on meta; None if it describes it."""
    if _described(run.config()):
        return None
    saved = run.path / _ARCHITECTURE
    if not saved.is_dir():
        raise OffloadError(
            f"{run.path} was started with a model that cannot be built from a configuration alone (peft, or not from "
            "transformers); build it as before and pass it: offload.resume(run_dir, model=...)"
        )
    dtype = json.loads((saved / "config.json").read_text(encoding="utf-8"))["dtype"]
    section = Config.load({"model": {"path": str(saved), "dtype": dtype}}).model
    assert section is not None
    model = models.build(section)
    # All buffers, those a checkpoint leaves out too: the user may have cast them with the model.
    for name, value in load_file(saved / _BUFFERS).items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = value
    return model


# ---- buffers of the model that training may change ----


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in model.state_dict().items() if name not in parameters}


def encode_buffers(model: nn.Module) -> dict[str, str]:
    """The model's persistent buffers (running statistics and the like) for the manifest."""
    return {
        name: base64.b64encode(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
        for name, t in _persistent(model).items()
    }


def decode_buffers(model: nn.Module, encoded: dict[str, str]) -> None:
    """Put the manifest's buffers back into the model."""
    for name, t in _persistent(model).items():
        if name in encoded and t.numel():
            raw = torch.frombuffer(bytearray(base64.b64decode(encoded[name])), dtype=torch.uint8)
            t.copy_(raw.view(t.dtype).view(t.shape))
