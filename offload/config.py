"""The config file: every key, its default, its type and which combinations exist.

The schema is the reference of what a user may write; loading from files, `--set` and the wording of errors are in
`configfile.py`. Paths are relative to the current directory. Sizes are text such as `48GiB` (binary) or `500GB`
(decimal), or a number of bytes; they are plain `int` bytes once loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
_SIZE_ACCEPTED = "a size such as 48GiB (binary) or 500GB (decimal), or a number of bytes, above 0"


def parse_size(value: object) -> int:
    """Bytes of `48GiB`, `1.5 GB`, `4096` or 4096. Raises ValueError for anything else, zero and negative included."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        unit = _UNITS.get(match[2].lower()) if match[2] else 1
        size = int(float(match[1]) * unit) if unit else 0
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        size = int(value)
    else:
        size = 0
    if size <= 0:
        raise ValueError(_SIZE_ACCEPTED)
    return size


def format_size(nbytes: int) -> str | int:
    """The exact inverse of `parse_size`: the largest unit that divides `nbytes`, binary first, else the number."""
    for unit in ("TiB", "GiB", "MiB", "TB", "GB", "MB", "KiB"):
        scale = _UNITS[unit.lower()]
        if nbytes >= scale and nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return nbytes


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # bool is an int in Python; `steps: true` is a mistake, not 1
        raise PydanticCustomError("number", "accepted: a number")
    return value


def _size_or_auto(value: object) -> int | str:
    if value == "auto":
        return "auto"
    try:
        return parse_size(value)
    except ValueError as error:
        raise PydanticCustomError("size", 'accepted: "auto" or {size}', {"size": str(error)}) from None


def _size(value: object) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise PydanticCustomError("size", "accepted: {size}", {"size": str(error)}) from None


def _int_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("steps", 'accepted: "auto" or a number of steps, 1 or more')


def _rows_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("rows", 'accepted: "auto" or a number of rows, 1 or more')


def _count_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise PydanticCustomError("chunks", 'accepted: "auto" or a number of chunks, 0 or more')


def _path(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _size_text(value: int | str) -> str | int:
    return value if isinstance(value, str) else format_size(value)


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Size = Annotated[int, BeforeValidator(_size), PlainSerializer(_size_text, when_used="json")]
SizeOrAuto = Annotated[
    int | Literal["auto"], BeforeValidator(_size_or_auto), PlainSerializer(_size_text, when_used="json")
]
IntOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_int_or_auto)]
RowsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_rows_or_auto)]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
PathText = Annotated[str, BeforeValidator(_path), Field(min_length=1)]


class Section(BaseModel):
    """A mapping of the config file; unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    path: PathText | None = Field(default=None, description="local Hugging Face directory or hub id")
    architecture: dict[str, Any] | None = Field(
        default=None,
        description="a fresh model with random weights: model_type and any key of that transformers config",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="what is computed in and streamed"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    attn_implementation: str | None = Field(default=None, description="transformers attention: eager, sdpa, ...")


class DataConfig(Section):
    path: PathText = Field(description=".jsonl .json .parquet .txt, a directory of them, or a hub data set id")
    format: Literal["text", "alpaca", "chat", "tokens"] = Field(
        default="alpaca",
        description="text, alpaca, chat (messages; the tokenizer's template) or tokens; text for a .txt path",
    )
    tokenizer: PathText | None = Field(
        default=None, description="default: the model's own; bytes: the embedded byte tokenizer"
    )
    sequence_length: Int = Field(default=1024, ge=4, description="tokens per row")
    packing: bool = Field(default=True, description="several samples per row, kept apart by position and mask")
    padding: bool = Field(default=True, description="false: rows that samples do not fill are left out")
    eval_fraction: Float = Field(default=0.0, ge=0, lt=1, description="share of the samples held back for evaluation")
    eval_path: PathText | None = Field(default=None, description="evaluation data of its own, same format")

    @property
    def whole_rows(self) -> bool:
        """Whether every row is one sequence from end to end, so that causal attention needs no mask."""
        return not self.packing and not self.padding

    @model_validator(mode="before")
    @classmethod
    def _text_files(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "format" not in raw and str(raw.get("path")).endswith(".txt"):
            return {**raw, "format": "text"}
        return raw


class OptimizerConfig(Section):
    name: Literal["adamw"] = Field(default="adamw", description="AdamW with decoupled weight decay")
    lr: Float = Field(default=1.0e-5, ge=0, description="peak learning rate")
    betas: tuple[Annotated[Float, Field(ge=0, lt=1)], Annotated[Float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Float = Field(default=1.0e-8, gt=0)
    weight_decay: Float = Field(default=0.0, ge=0, description="on all parameters")
    state: Literal["fp32"] = Field(default="fp32", description="format of the moments")


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="transformers' formulas")
    warmup_steps: Int = Field(default=50, ge=0)


class TrainConfig(Section):
    method: Literal["full", "zo"] = Field(default="full", description="full: back-propagation; zo: zeroth-order")
    steps: Int | None = Field(
        default=1000, ge=0, description="optimizer steps of the run; also the length of the schedule"
    )
    epochs: Float | None = Field(default=None, gt=0, description="instead of steps: passes over the training data")
    micro_batch_size: RowsOrAuto = Field(
        default=1, description="rows per forward; auto: the largest that pays and divides global_batch_size"
    )
    global_batch_size: Int = Field(
        default=16, ge=1, description="rows per step: dimension 0 of the batch, split in order"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    max_grad_norm: Float | None = Field(default=1.0, gt=0, description="null: no clipping")
    head_chunks: CountOrAuto = Field(
        default="auto",
        description="parts of a micro-batch's rows for head and loss; 0: the model's own loss, logits whole",
    )
    compile: bool = Field(default=False, description="torch.compile of the repeated blocks: equal to rounding only")
    commit_every: IntOrAuto = Field(default="auto", description="steps between durable commits")
    eval_every: Int | None = Field(default=None, ge=1, description="steps; needs data.eval_fraction or data.eval_path")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="also log to these")
    seed: Int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default_steps(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("epochs") is not None and "steps" not in raw:
            return {**raw, "steps": None}
        return raw


class ZoConfig(Section):
    variant: Literal["sgd", "sign", "momentum", "adam", "sparse", "block", "conservative", "qzo"] = Field(
        default="sgd", description="what is done along the directions: see docs/zeroth_order.md"
    )
    eps: Float = Field(default=1.0e-3, gt=0, description="size of the perturbation")
    samples: Int = Field(default=1, ge=1, description="directions per step")
    weights: Literal["auto", "float32", "bfloat16", "float16", "float8"] = Field(
        default="auto", description="what weights rest and travel in; auto: model.dtype"
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="of updated weights; stochastic keeps small updates alive in few bits"
    )
    clip: Float | None = Field(default=None, gt=0, description="largest magnitude of a projected gradient")
    sparsity: Float = Field(default=0.75, gt=0, lt=1, description="variant sparse: share of the weights left alone")
    blocks: Int = Field(default=2, ge=1, description="variant block: groups of units that take turns")
    bits: Literal[4, 8] = Field(default=4, description="variant qzo: bits of a quantized weight")


class CxlConfig(Section):
    node: Annotated[Int, Field(ge=0)] | list[Annotated[Int, Field(ge=0)]] | None = Field(
        default=None, description="NUMA node of the memory, several interleaved; null: those without CPUs"
    )
    size: Size
    emulate: bool = Field(default=False, description="RAM stands in for the node, slowed down")
    bandwidth: Size | None = Field(default=None, description="of an emulated node, bytes per second")
    latency: Float = Field(default=4.0e-7, ge=0, description="of an emulated node, seconds")

    @property
    def nodes(self) -> list[int] | None:
        """The nodes that are named, if any."""
        return [self.node] if isinstance(self.node, int) else self.node


class NvmePath(Section):
    path: PathText = Field(description="a directory on the SSD; the store makes its own directory in it")
    size: SizeOrAuto = Field(default="auto", description="budget; auto: what is free")
    tbw: Float | None = Field(
        default=None, gt=0, description="rated terabytes written, for the wear shown in the report"
    )


class MemoryConfig(Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    gpu: SizeOrAuto = Field(default="auto", description="device memory; on device cpu the arena that stands for it")
    cpu: SizeOrAuto = Field(
        default="auto",
        description="all the run takes in RAM beyond its footprint; on device cpu including the device arena",
    )
    cxl: CxlConfig | None = Field(default=None, description="memory of a NUMA node without CPUs")
    lock: bool = Field(default=False, description="keep the run's buffers in RAM: never swapped out (mlock)")
    nvme: list[NvmePath] | None = Field(
        default=None, min_length=1, description="several paths are striped; null: one store under <output>/store"
    )
    backend: Literal["auto", "threads", "io_uring", "libaio", "aiofiles"] = "auto"
    io_timeout: Float = Field(default=120.0, gt=0, description="seconds without progress after which a drive is hung")


class PlannerConfig(Section):
    solver: Literal["auto", "mip", "greedy"] = "auto"
    time_limit: Float = Field(default=10, gt=0, description="seconds")
    activations: Literal["auto", "recompute"] = Field(
        default="auto", description="auto keeps, swaps or recomputes what autograd saves; recompute does only that"
    )


class Config(Section):
    """One run. `model` and `data` may be absent when `offload.wrap` is given a model and batches."""

    model: ModelConfig | None = None
    data: DataConfig | None = None
    train: TrainConfig = TrainConfig()
    zo: ZoConfig | None = Field(default=None, description="only with train.method zo")
    memory: MemoryConfig = MemoryConfig()
    planner: PlannerConfig = PlannerConfig()
    output: PathText = Field(default="runs/my-run", description="the run directory")

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, raw: Any) -> Any:
        """`train:` with nothing under it is YAML for null, and means the defaults."""
        if not isinstance(raw, Mapping):
            return raw
        return {k: v for k, v in raw.items() if v is not None or k not in ("train", "memory", "planner")}

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if problems := list(_impossible(self)):
            raise PydanticCustomError("combination", "{text}", {"text": "\n".join(problems)})
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()) -> Config:
        """The config in a .yaml, .toml or .json file, a mapping or another config, with `key.sub=value` overrides.

        Raises ConfigError that names the key, what it got, what it accepts and the nearest valid key.
        """
        from offload import configfile

        return configfile.load(source, overrides)

    def dump(self) -> dict[str, Any]:
        """Plain data that `Config.load` reads back to an equal config; sizes as text where exact."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the config as YAML, atomically."""
        import yaml

        from offload.rundir import write_atomically

        write_atomically(path, yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True))

    def resolved(self) -> Config:
        """The same run described from any directory: local paths absolute, `memory.nvme` left null if it is."""
        raw = self.dump()
        raw["output"] = absolute(self.output)
        if self.model and self.model.path and is_local(self.model.path):
            raw["model"]["path"] = absolute(self.model.path)
        if self.data:
            for key in ("path", "eval_path", "tokenizer"):
                value = raw["data"][key]
                if value and not (key == "tokenizer" and value == "bytes") and is_local(value):
                    raw["data"][key] = absolute(value)
        for entry in raw["memory"]["nvme"] or []:
            entry["path"] = absolute(entry["path"])
        return Config.model_validate(raw)

    def store_paths(self) -> list[NvmePath]:
        """Where the store lies: `memory.nvme` with absolute paths, or `<output>/store` of size auto."""
        if self.memory.nvme is None:
            return [NvmePath(path=absolute(str(Path(self.output) / "store")))]
        return [entry.model_copy(update={"path": absolute(entry.path)}) for entry in self.memory.nvme]

    def with_micro_batch_size(self, rows: int | Literal["auto"]) -> Config:
        """The same run with `train.micro_batch_size` settled, where it is `auto`."""
        if self.train.micro_batch_size != "auto":
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch_size": rows})})


def absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def is_local(path: str) -> bool:
    """Whether a `path` that may also be a hub id means a file or directory of this machine."""
    if path.startswith((".", "/", "~")) or Path(path).exists():
        return True
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is None or Path(path).suffix in (
        ".jsonl", ".json", ".parquet", ".txt"
    )  # fmt: skip


def _impossible(cfg: Config) -> Iterable[str]:
    """Every combination of valid values that no run can have, as `key: what it got; what is accepted`."""
    model, data, train, memory = cfg.model, cfg.data, cfg.train, cfg.memory
    if model:
        if model.path and model.architecture:
            yield "model.architecture: given together with model.path; keep the one the run starts from"
        if model.architecture and not isinstance(model.architecture.get("model_type"), str):
            yield (
                f"model.architecture.model_type: got {model.architecture.get('model_type')!r}; "
                "accepted: the name of a transformers architecture, such as llama"
            )
        if model.dtype == "float16" and train.method == "full":
            yield (
                "model.dtype: got 'float16' with train.method 'full', which needs dynamic loss scaling and is not "
                "available; accepted: 'bfloat16' or 'float32'"
            )
    if data:
        if Path(data.path).suffix == ".txt" and data.format != "text":
            yield f"data.format: got {data.format!r} for {data.path}; a .txt file holds 'text'"
        if data.eval_fraction and data.eval_path:
            yield "data.eval_fraction: given together with data.eval_path; keep one of them"
    if train.steps is not None and train.epochs is not None:
        yield (
            f"train.epochs: got {train.epochs:g} together with train.steps {train.steps}; "
            "keep one of them (or set the other to null)"
        )
    if train.steps is None and train.epochs is None:
        yield "train.steps: got null without train.epochs; give one of them"
    if train.epochs is not None and not data:
        yield f"train.epochs: got {train.epochs:g} without data, so an epoch has no length; give train.steps"
    if train.micro_batch_size != "auto" and train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size: got {train.global_batch_size}, which is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}; "
            f"the next that is: {-(-train.global_batch_size // train.micro_batch_size) * train.micro_batch_size}"
        )
    if train.eval_every and not (data and (data.eval_fraction or data.eval_path)):
        yield (
            f"train.eval_every: got {train.eval_every} without evaluation data; "
            "give data.eval_fraction or data.eval_path"
        )
    if train.method == "zo":
        yield from _impossible_zo(cfg.zo or ZoConfig())
    elif cfg.zo:
        yield "zo: given with train.method 'full'; this section belongs to method 'zo' only, remove it"
    if cxl := memory.cxl:
        if cxl.emulate and cxl.node is not None:
            yield "memory.cxl.emulate: given together with memory.cxl.node; keep one of them"
        if bool(cxl.bandwidth) != cxl.emulate:
            yield "memory.cxl.bandwidth: belongs to memory.cxl.emulate, which needs it; a real node has its own"
    paths = [absolute(entry.path) for entry in memory.nvme or []]
    for path in sorted({p for p in paths if paths.count(p) > 1}):
        yield f"memory.nvme: {path} stands twice; give each path once"


def _impossible_zo(zo: ZoConfig) -> Iterable[str]:
    if zo.variant == "qzo" and zo.weights != "auto":
        yield f"zo.weights: got {zo.weights!r} with variant 'qzo', whose weights are of zo.bits bits; accepted: 'auto'"
    if zo.variant == "sparse" and zo.weights == "float8":
        yield "zo.weights: got 'float8' with variant 'sparse'; accepted: 'auto', 'float32', 'bfloat16' or 'float16'"
    if zo.rounding == "stochastic" and zo.variant in ("qzo", "conservative"):
        yield f"zo.rounding: got 'stochastic' with variant {zo.variant!r}; accepted: 'nearest'"
