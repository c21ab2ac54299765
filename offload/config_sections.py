"""The sections of the config file: every key with its type, its default and what it means.

A description is Markdown: `config_reference.py` prints all of it in the table of `docs/config.md`. Its first sentence
stands alone in the comments that `offload init` writes and in errors, so the gist comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from offload.config_values import (
    ChunksOrAuto,
    DataPath,
    Float,
    Int,
    ModelPath,
    PathText,
    RowsOrAuto,
    Section,
    Size,
    SizeOrAuto,
    StepsOrAuto,
    TokenizerPath,
)


class ModelConfig(Section):
    path: ModelPath | None = Field(
        default=None,
        description="a Hugging Face model with safetensors, by its directory or hub id. Pickled weights are refused; "
        "what can only be a directory starts with `.`, `/` or `~`",
    )
    architecture: dict[str, Any] | None = Field(
        default=None,
        description="a fresh model with random weights: `model_type` and any key of that `transformers` config. "
        "Unknown keys are errors",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="computed in and streamed; `float16` only with method `zo`. With `full` it is refused: it "
        "needs loss scaling",
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    attn_implementation: str | None = Field(
        default=None, description="`transformers`' attention: `eager`, `sdpa`, ...; null: its own choice"
    )


class DataConfig(Section):
    path: DataPath = Field(
        description="`.jsonl`, `.json`, `.parquet`, `.txt`, a directory of them, or a hub data set id. "
        "The last needs the `datasets` package"
    )
    format: Literal["text", "alpaca", "chat", "tokens"] = Field(
        default="alpaca",
        description="what a row holds. See below; `text` when `path` ends in `.txt` and no format is given",
    )
    tokenizer: TokenizerPath | None = Field(
        default=None, description="null: the model's own; `bytes`: the embedded byte tokenizer (261 ids)"
    )
    sequence_length: Int = Field(default=1024, ge=4, description="tokens per row")
    packing: bool = Field(default=True, description="several samples per row, kept apart by position and mask")
    padding: bool = Field(
        default=True,
        description="`false`: rows that samples do not fill are left out, and batches of your own must have none. With "
        "`packing: false` no attention mask is then needed, nor planned for: it takes `sequence_length`² bytes per "
        "row, and as many values of the compute dtype where `sdpa` uses it",
    )
    eval_fraction: Float = Field(default=0.0, ge=0, lt=1, description="share of the samples held back for evaluation")
    eval_path: DataPath | None = Field(
        default=None, description="evaluation data of its own, same format; not together with `eval_fraction`"
    )

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
    betas: tuple[Annotated[Float, Field(ge=0, lt=1)], Annotated[Float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="decay of the two moments"
    )
    eps: Float = Field(default=1.0e-8, gt=0, description="added to the root of the second moment")
    weight_decay: Float = Field(default=0.0, ge=0, description="on all parameters")
    state: Literal["fp32"] = Field(default="fp32", description="format of the moments")


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="`transformers`' formulas; the first step has their value at 0"
    )
    warmup_steps: Int = Field(default=50, ge=0, description="steps in which the learning rate rises to its peak")


class TrainConfig(Section):
    method: Literal["full", "zo"] = Field(
        default="full",
        description="`full`: back-propagation and AdamW; `zo`: forward passes only ([zeroth order](zeroth_order.md))",
    )
    steps: Int | None = Field(
        default=1000, ge=0, description="optimizer steps of the run, or give `epochs`; also the length of the schedule"
    )
    epochs: Float | None = Field(default=None, gt=0, description="passes over the data, instead of `steps`")
    micro_batch_size: RowsOrAuto = Field(
        default=1,
        description="rows per forward; `auto`: the largest that pays and divides `global_batch_size`. That is the "
        "planner's choice; the run's `config.yaml` holds the number, and `--resume` keeps it",
    )
    global_batch_size: Int = Field(
        default=16,
        ge=1,
        description="rows per step; more of them spread the cost of moving the weights. A multiple of "
        "`micro_batch_size`, split in order into micro-batches",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    max_grad_norm: Float | None = Field(
        default=1.0,
        gt=0,
        description="clip by the global norm; null: no clipping, and the optimizer runs during backward",
    )
    head_chunks: ChunksOrAuto = Field(
        default="auto",
        description="head and loss are computed together, a micro-batch's rows in so many chunks. With 1 the numbers "
        "are those of the model's own loss, with more they agree to rounding and logits take less memory; `auto`: 1, "
        "more if it does not fit otherwise; 0: the model's own loss, logits whole, which is also what a model gets "
        "whose use of its logits is not recognised (the plan says why)",
    )
    compile: bool = Field(
        default=False,
        description="`torch.compile` of the repeated blocks, each kind once; the numbers then equal plain PyTorch's to "
        "rounding. Needs a C++ compiler on `cpu`; on `cuda` triton and a C compiler. The step that compiles takes tens "
        "of seconds more, and the compiler's own memory is in no plan. The planner's times and activations are those "
        "of uncompiled blocks",
    )
    commit_every: StepsOrAuto = Field(
        default="auto",
        description="steps between durable commits. `auto`: 1 when all state is on NVMe, else what writing behind "
        "keeps up with",
    )
    eval_every: Int | None = Field(
        default=None, ge=1, description="steps between evaluations; needs `data.eval_fraction` or `data.eval_path`"
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="also log to these. Their packages must be installed"
    )
    seed: Int = Field(default=0, ge=0, lt=2**63, description="data order, dropout, random weights")

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default_steps(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("epochs") is not None and "steps" not in raw:
            return {**raw, "steps": None}
        return raw


class ZoConfig(Section):
    variant: Literal["sgd", "sign", "momentum", "adam", "sparse", "block", "conservative", "qzo"] = Field(
        default="sgd", description="what is done along the directions"
    )
    eps: Float = Field(default=1.0e-3, gt=0, description="size of the perturbation")
    samples: Int = Field(default=1, ge=1, description="directions per step, averaged")
    weights: Literal["auto", "float32", "bfloat16", "float16", "float8"] = Field(
        default="auto", description="what weights rest and travel in; `auto`: `model.dtype`"
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
        default=None,
        description="NUMA node, several take turns page by page; null: all that have memory and no CPUs",
    )
    size: Size = Field(description="what a run may take there, of all nodes together")
    emulate: bool = Field(
        default=False,
        description="RAM stands in for the node, as slow as the next two keys say; plans and reports say that it is "
        "emulated",
    )
    bandwidth: Size | None = Field(default=None, description="bytes per second of an emulated node")
    latency: Float = Field(default=4.0e-7, ge=0, description="seconds, of an emulated node")

    @property
    def nodes(self) -> list[int] | None:
        """The nodes that are named, if any."""
        return [self.node] if isinstance(self.node, int) else self.node


class NvmePath(Section):
    path: PathText = Field(
        description="a directory on the SSD; the store makes one of this run's own in it, with a lock"
    )
    size: SizeOrAuto = Field(default="auto", description="budget; `auto`: what is free, less 2 % of the file system")
    tbw: Float | None = Field(default=None, gt=0, description="rated terabytes written, for the wear in the report")


class MemoryConfig(Section):
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="where units are computed; `auto`: CUDA if there is a device"
    )
    gpu: SizeOrAuto = Field(
        default="auto",
        description="device memory; `auto`: all but 1 GiB. On `cpu`: the arena in RAM that stands for it",
    )
    cpu: SizeOrAuto = Field(
        default="auto",
        description="all the run takes in RAM beyond the footprint (`python -m offload.footprint MODEL_TYPE`); on "
        "`cpu` it includes the arena. `auto` obeys control groups and leaves the system room",
    )
    cxl: CxlConfig | None = Field(
        default=None,
        description="memory of NUMA nodes without CPUs, which a run may place state and activations in. "
        "See [storage.md](storage.md#cxl-memory)",
    )
    lock: bool = Field(
        default=False,
        description="keep the run's buffers in RAM, never swapped out (`mlock`; needs `ulimit -l`). CUDA's pinned "
        "memory always is",
    )
    nvme: list[NvmePath] | None = Field(
        default=None,
        min_length=1,
        description="directories of the store, on the fastest SSDs, striped; null: `<output>/store`. Each path once",
    )
    backend: Literal["auto", "threads", "io_uring", "libaio", "aiofiles"] = Field(
        default="auto",
        description="how bytes reach the store: [io.md](io.md#backends). `auto`: the fastest here, measured once and "
        "kept in `io.json`. One that does not work is replaced by `threads`, with its reason",
    )
    io_timeout: Float = Field(
        default=120.0,
        gt=0,
        description="seconds in which a drive makes no progress at all before it counts as hung. The run then ends "
        "with an error that names file and offset, and goes on from the last commit with `--resume`",
    )


class PlannerConfig(Section):
    solver: Literal["auto", "mip", "greedy"] = Field(
        default="auto",
        description="`greedy`: a search alone; `auto` and `mip`: a mixed integer program too, if its step is faster",
    )
    time_limit: Float = Field(default=10, gt=0, description="seconds that the solver may take")
    activations: Literal["auto", "recompute"] = Field(
        default="auto",
        description="`auto` keeps, swaps or recomputes what autograd saves inside a block, whatever is fastest within "
        "the budgets; `recompute` runs every block again in backward",
    )
