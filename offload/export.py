"""Writing a model as a Hugging Face directory without holding it: headers first, then tensors slice by slice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from offload import conversion
from offload.errors import WeightsError
from offload.io import sync
from offload.models import original_config
from offload.names import base_model_of, is_peft
from offload.tensor_files import DTYPES, INDEX_FILE, SINGLE_FILE

_SLICE_BYTES = 4 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Lies in a directory while it is being written, so that what a killed process left can be told from a user's files.
_MARKER = ".unfinished-export"


class Reader(Protocol):
    """Current values of parameters; `offload.weights` has such sources."""

    def read(self, name: str, start: int, count: int) -> Tensor: ...


@dataclass(frozen=True)
class _Output:
    """One tensor of the files; `slices` gives its elements in order, 1-D, when its turn has come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save_pretrained(
    model: nn.Module,
    out_dir: str | Path,
    tensors: Reader,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights, config.json, generation config and tokenizer so that `from_pretrained` loads the same bits.

    The directory appears at once, when all is written and synced. Architectures whose checkpoints differ from their
    modules (experts stored one by one) are written like their checkpoints. Of a peft model only the adapter is written,
    in peft's own format.

    Args:
        model: transformers or peft model; parameters may be on meta, persistent buffers are taken from it.
        out_dir: must not exist, or be empty.
        tensors: `read(name, start, count)` gives current values, names as in `model.named_parameters()`.
        tokenizer: saved too, if given.
        max_shard_bytes: a larger model is cut into several files; a tensor is never cut.
        dtype: of floating-point parameters in the files; by default each parameter's own.
    Raises WeightsError when `out_dir` has files in it or the model cannot be written, OSError when the disk is full.
    """
    base = base_model_of(model)
    with _directory(Path(out_dir)) as partial:
        values = _Values(model, tensors, dtype)
        if is_peft(model):
            _write_adapter(model, base, values, partial)
        else:
            _write_configuration(base, partial, dtype)
            outputs = _outputs(base, values)
            _write_shards(outputs, partial, SINGLE_FILE, max_shard_bytes, base.num_parameters())
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


@contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well and vanishes when it does not."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise WeightsError(f"{out} exists and is not an empty directory; choose another, or remove it")
    partial = out.absolute().with_name(out.absolute().name + ".tmp")
    if partial.exists():
        if not (partial / _MARKER).is_file():
            raise WeightsError(f"{partial} is in the way of writing {out}; move or remove it")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        (partial / _MARKER).touch()
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        os.rename(partial, out)
        (out / _MARKER).unlink()  # last: without it, what a kill leaves could not be told from a user's files
        sync(out)
        sync(out.absolute().parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise


class _Values:
    """Tensors of a model by any of their names: parameters from the reader, persistent buffers from the model."""

    def __init__(self, model: nn.Module, reader: Reader, dtype: torch.dtype | None) -> None:
        self._reader = reader
        canonical = {id(p): name for name, p in model.named_parameters()}
        self.shapes: dict[str, Tensor] = {}  # on meta, in the dtype of the files
        self.shared: list[list[str]] = []
        self._readable: dict[str, str] = {}
        self._buffers: dict[str, Tensor] = {}
        names: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise WeightsError(f"{name} is extra state of a module and no tensor; it cannot be written")
            cast = dtype is not None and tensor.is_floating_point() and id(tensor) in canonical
            self.shapes[name] = torch.empty(tensor.shape, dtype=dtype if cast else tensor.dtype, device="meta")
            names.setdefault(id(tensor), []).append(name)
            if id(tensor) in canonical:
                self._readable[name] = canonical[id(tensor)]
            else:
                self._buffers[name] = tensor
        self.shared = [group for group in names.values() if len(group) > 1]

    def slices(self, name: str) -> Iterator[Tensor]:
        """The elements of a tensor in order."""
        if name in self._buffers:
            yield self._buffers[name].detach().reshape(-1).cpu()
            return
        shape = self.shapes[name]
        step = _SLICE_BYTES // shape.dtype.itemsize
        for start in range(0, shape.numel(), step):
            count = min(step, shape.numel() - start)
            values = self._reader.read(self._readable[name], start, count)
            if values.numel() != count:
                raise WeightsError(f"{name}: {values.numel()} elements from {start} were read instead of {count}")
            yield values.to(device="cpu", dtype=shape.dtype)

    def whole(self, name: str) -> Tensor:
        shape = self.shapes[name]
        full = torch.empty(shape.shape, dtype=shape.dtype)
        flat, start = full.view(-1), 0
        for part in self.slices(name):
            flat[start : start + part.numel()] = part
            start += part.numel()
        return full


def _outputs(model: PreTrainedModel, values: _Values) -> list[_Output]:
    """All tensors to write, those that are converted together next to each other."""
    left_out = conversion.not_saved(model) | _tied_away(model, values)
    rules = conversion.save_rules(model, [name for name in values.shapes if name not in left_out])
    outputs = []
    for name, original in rules.direct.items():
        shape = values.shapes[original]
        outputs.append(_Output(name, shape.dtype, tuple(shape.shape), _bind(values.slices, original)))
    for group in rules.conversions:
        shapes = group.run(model, lambda name: values.shapes[name])
        converted = _Converted(model, group, values, len(shapes))
        for name, shape in shapes.items():
            outputs.append(_Output(name, shape.dtype, tuple(shape.shape), _bind(converted.slices, name)))
    # Wider elements first, so that every tensor is aligned to its own elements. The order stays otherwise.
    return sorted(outputs, key=lambda output: -output.dtype.itemsize)


def _bind(function: Callable[[str], Iterator[Tensor]], name: str) -> Callable[[], Iterator[Tensor]]:
    return lambda: function(name)


class _Converted:
    """The results of one conversion; made when the first is asked for, gone when the last has been given."""

    def __init__(self, model: PreTrainedModel, group: conversion.Conversion, values: _Values, count: int) -> None:
        self._model, self._group, self._values, self._left = model, group, values, count
        self._results: dict[str, Tensor] = {}

    def slices(self, name: str) -> Iterator[Tensor]:
        if not self._results:
            self._results = self._group.run(self._model, self._values.whole)
        yield self._results[name].reshape(-1)
        self._left -= 1
        if not self._left:
            self._results = {}


def _tied_away(model: PreTrainedModel, values: _Values) -> set[str]:
    """Of names that share one tensor all but the one transformers keeps (`remove_tied_weights_from_state_dict`)."""
    is_declared = conversion.declared_ties(model)
    away: set[str] = set()
    for names in values.shared:
        declared = sorted(name for name in names if is_declared(name))
        kept = next((name for name in sorted(names) if name not in declared), sorted(names)[-1])
        away |= set(names) - {kept}
    return away


def _write_configuration(model: PreTrainedModel, directory: Path, dtype: torch.dtype | None) -> None:
    config = original_config(model)
    config.dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, str(directory), config=config)  # type: ignore[arg-type]
    config.save_pretrained(str(directory))
    if model.can_generate():
        # Not its own save_pretrained: that refuses settings which many a published model has.
        model.generation_config.to_json_file(str(directory / "generation_config.json"), use_diff=True)


def _write_adapter(model: Any, base: PreTrainedModel, values: _Values, directory: Path) -> None:
    import peft

    if len(model.active_adapters) != 1:
        raise WeightsError(f"{len(model.active_adapters)} adapters are active; call model.set_adapter with one")
    adapter = model.active_adapters[0]
    settings = model.peft_config[adapter]
    found = peft.get_peft_model_state_dict(model, state_dict=dict(values.shapes), adapter_name=adapter)
    origin = {id(shape): name for name, shape in values.shapes.items()}
    outputs = []
    for name, shape in found.items():
        if id(shape) not in origin:
            raise WeightsError(f"{name}: adapters of type {settings.peft_type.value} cannot be written yet")
        outputs.append(_Output(name, shape.dtype, tuple(shape.shape), _bind(values.slices, origin[id(shape)])))
    outputs.sort(key=lambda output: -output.dtype.itemsize)
    _write_file(directory / peft.utils.SAFETENSORS_WEIGHTS_NAME, outputs)
    path, mode = settings.base_model_name_or_path, settings.inference_mode
    try:
        settings.base_model_name_or_path = path or base.name_or_path or None
        settings.inference_mode = True
        mapping = _auto_mapping(base) if settings.task_type is None else None
        settings.save_pretrained(str(directory), auto_mapping_dict=mapping)
    finally:
        settings.base_model_name_or_path, settings.inference_mode = path, mode


def _auto_mapping(base: PreTrainedModel) -> dict[str, str]:
    return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}


def _write_shards(outputs: list[_Output], directory: Path, name: str, max_bytes: int, parameters: int) -> None:
    shards: list[list[_Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    if len(shards) == 1:
        _write_file(directory / name, outputs)
        return
    stem = name.removesuffix(".safetensors")
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write_file(directory / file, shard)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": sum(output.nbytes for output in outputs)},
        "weight_map": {output.name: file for file, shard in zip(files, shards, strict=True) for output in shard},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, outputs: list[_Output]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        offsets = [end, end + output.nbytes]
        header[output.name] = {"dtype": _DTYPE_NAMES[output.dtype], "shape": output.shape, "data_offsets": offsets}
        end += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for output in outputs:
            for part in output.slices():
                _write(file, part)


def _write(file: BinaryIO, values: Tensor) -> None:
    if values.numel():
        file.write(values.contiguous().view(torch.uint8).numpy().data)
