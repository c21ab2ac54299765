"""The weights of a Hugging Face checkpoint directory, checked against a model up front and then read slice by slice."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload import conversion
from offload.conversion import Conversion
from offload.errors import WeightsError
from offload.names import BaseTensor, base_model_of, base_tensors
from offload.random_init import RandomSource
from offload.tensor_files import TensorFiles

# What weights may be stored as. Eight-bit floats mean nothing without the scales of their quantisation.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COMPARE = 1 << 20  # elements per slice when two stored copies of a tied weight are compared


class CheckpointSource:
    """Reads a model's parameters from safetensors files.

    A stored tensor that is a parameter, under its own or an older name, is read by slices. One that transformers
    converts (experts stored one by one) is made whole when first asked for, kept while it is read, and dropped at its
    end or when another is asked for.
    """

    def __init__(self, directory: str | Path, model: nn.Module) -> None:
        """Check every name, shape, dtype and file size; no weight is read.

        Args:
            directory: holds `model.safetensors`, or shards and their index.
            model: a transformers model, or a peft model around one (its adapters are not looked for).
        Raises WeightsError: missing, unexpected, mis-shaped or non-float tensors, damaged or pickled files.
        """
        self._model = model
        self._base = base_model_of(model)
        self._names: dict[str, str] = {}  # parameter of the model -> its name in a checkpoint of the base model
        self._origins: dict[str, str | Conversion] = {}  # that name -> stored tensor, or what makes it from several
        self._buffers: dict[str, Tensor] = {}
        self._duplicates: list[tuple[str, str]] = []  # tied names that are both stored
        self.directory = Path(directory)
        if getattr(self._base.config, "quantization_config", None):
            raise WeightsError(
                f"{self.directory} is quantised (quantization_config in config.json), but training needs weights in "
                "bfloat16, float16 or float32: use the checkpoint that was published without quantisation"
            )
        self._files = TensorFiles(
            self.directory,
            getattr(self._base.config, "transformers_weights", None),
            f"If you trust the source, convert them once with:\n{load_and_save(self._base, self.directory)}",
        )
        self._converted: tuple[Conversion, dict[str, Tensor]] | None = None
        self._fallback: RandomSource | None = None
        self._lock = threading.Lock()
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """Parameters that can be read: all but those of adapters."""
        return list(self._names)

    @property
    def order(self) -> list[str]:
        """Names of the parameters the checkpoint has, as they lie in its files."""

        def place(name: str) -> tuple[str, int]:
            origin = self._origins[self._names[name]]
            stored = self._files.tensors[origin if isinstance(origin, str) else origin.sources[0][1]]
            return str(stored.file), stored.offset

        return sorted((n for n in self._names if self._names[n] in self._origins), key=place)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a parameter: 1-D, on the CPU, in the dtype of the file."""
        if self._names[name] not in self._origins:
            # Checkpoints may lack it, because the model makes it itself: sinusoidal positions, say.
            with self._lock:
                self._fallback = self._fallback or RandomSource(self._model, 0)
                return self._fallback.read(name, start, count)
        return self._read(self._names[name], start, count)

    def load_buffers(self) -> None:
        """Copy persistent buffers into the model's own, in their dtype."""
        for name, buffer in self._buffers.items():
            if name in self._origins:
                with torch.no_grad():
                    buffer.copy_(self._read(name, 0, buffer.numel()).view(buffer.shape))

    def close(self) -> None:
        self._converted = None
        self._files.close()

    def _read(self, name: str, start: int, count: int) -> Tensor:
        origin = self._origins[name]
        if isinstance(origin, str):
            return self._files.read(origin, start, count)
        with self._lock:
            if self._converted is None or self._converted[0] is not origin:
                self._converted = None  # before the next is made
                self._converted = (origin, origin.run(self._base, self._whole))
            results = self._converted[1]
            values = results[name].reshape(-1)
            if start + count >= values.numel():
                del results[name]
                if not results:
                    self._converted = None
            return values[start : start + count]

    def _whole(self, tensor: str) -> Tensor:
        stored = self._files.tensors[tensor]
        return self._files.read(tensor, 0, stored.nbytes // stored.dtype.itemsize).view(stored.shape)

    def _check(self) -> None:
        """Decide where each parameter comes from (`_origins`), or raise one error that names all that does not fit."""
        tensors = base_tensors(self._model)
        expected = {t.base_name: t.tensor for t in tensors}
        rules = conversion.load_rules(self._base, expected, list(self._files.tensors))
        problems = _Problems(self._base, self.directory)
        for name, tensor, other in rules.clashes:
            problems.other.append(f"{tensor} and {other} are both {name}")
        for name, stored_name in rules.direct.items():
            stored = self._files.tensors[stored_name]
            problems.compare(stored_name, stored.shape, stored.dtype, name, expected[name])
            self._origins[name] = stored_name
        for group in rules.conversions:
            for name, result in group.run(self._base, self._shape).items():
                if name in expected:
                    made = f"{name} made from {group.sources[0][1]}, ..."
                    problems.compare(made, result.shape, result.dtype, name, expected[name])
                    self._origins[name] = group
                else:
                    problems.unexpected.append(group.sources[0][1])
        self._buffers = {t.base_name: t.tensor for t in tensors if not t.is_parameter}
        computed = {name for name, _ in self._base.named_buffers()} - set(self._buffers)
        may_have = conversion.ignorable_unexpected(self._base)
        # A buffer that today's model computes, and older versions saved, is no matter.
        problems.unexpected += [name for name, as_ in rules.unexpected if not may_have(as_) and as_ not in computed]
        self._choose(tensors, problems)
        problems.report()
        for name, other in self._duplicates:
            self._compare_copies(name, other)

    def _choose(self, tensors: list[BaseTensor], problems: _Problems) -> None:
        """For each parameter the name under which it is stored: a tied one may be there under any of its names."""
        may_lack = conversion.ignorable_missing(self._base)
        aliases: dict[int, list[str]] = {}
        for t in tensors:
            aliases.setdefault(id(t.tensor), []).append(t.base_name)
        canonical = {id(p): name for name, p in self._model.named_parameters()}
        for key, names in aliases.items():
            stored = [name for name in names if name in self._origins]
            if not stored and not any(may_lack(name) for name in names):
                problems.missing.append(names[0])
            if key in canonical:
                self._names[canonical[key]] = (stored or names)[0]
            self._duplicates += [(stored[0], other) for other in stored[1:]]

    def _compare_copies(self, name: str, other: str) -> None:
        origin = self._origins[name]
        numel = self._shape(origin).numel() if isinstance(origin, str) else 0
        for start in range(0, numel, _COMPARE):
            count = min(_COMPARE, numel - start)
            if not torch.equal(self._read(name, start, count), self._read(other, start, count)):
                raise WeightsError(
                    f"{self.directory} stores different weights for {name} and {other}, but its config.json ties them: "
                    "set tie_word_embeddings to false there, or remove the one that is not meant"
                )

    def _shape(self, tensor: str) -> Tensor:
        stored = self._files.tensors[tensor]
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


class _Problems:
    """What does not fit between a checkpoint and a model, for one message."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.model, self.directory = model, directory
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.shapes: list[str] = []
        self.other: list[str] = []

    def compare(self, stored: str, shape: tuple[int, ...], dtype: torch.dtype, name: str, wanted: Tensor) -> None:
        if tuple(shape) != tuple(wanted.shape):
            self.shapes.append(f"{stored} has shape {tuple(shape)}, the model's {name} {tuple(wanted.shape)}")
        floating = dtype in FLOATS if wanted.is_floating_point() else not dtype.is_floating_point
        if not floating:
            kind = "a floating-point number of 16 bits or more" if wanted.is_floating_point() else "an integer"
            self.other.append(f"{stored} is stored as {dtype}, but {name} is {kind}")

    def report(self) -> None:
        parts = []
        if self.missing:
            parts.append(f"it has no {_some(self.missing)}")
        if self.unexpected:
            parts.append(f"the model has no {_some(sorted(self.unexpected))}")
        parts += [_some(found, "; ") for found in (self.shapes, self.other) if found]
        if parts:
            what = f"{self.directory} does not fit {type(self.model).__name__}: {'; '.join(parts)}. "
            raise WeightsError(what + self._advice())

    def _advice(self) -> str:
        prefix = self.model.base_model_prefix + "."
        has_head = self.model.base_model is not self.model
        if self.missing and has_head and not any(name.startswith(prefix) for name in self.missing):
            return (
                "The weights of the head for this task are not in the checkpoint. To begin with random ones, write a "
                f"complete checkpoint once:\n{load_and_save(self.model, self.directory)}"
            )
        if self.unexpected and not (self.missing or self.shapes or self.other):
            return (
                "It was saved by another class or version. If these tensors are not needed, write a checkpoint without "
                f"them once:\n{load_and_save(self.model, self.directory)}"
            )
        return "config.json and the weights are of different models, or the files are incomplete: fetch them again"


def load_and_save(model: PreTrainedModel, directory: Path) -> str:
    """A command that has transformers load a checkpoint whole and save it again."""
    name = type(model).__name__
    return (
        f'  python -c "from transformers import {name} as M; '
        f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('{directory}-converted')\"\n"
        "(needs RAM for the whole model; copy the tokenizer files over, and give the new directory as model.path)"
    )


def _some(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
