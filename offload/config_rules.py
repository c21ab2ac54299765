"""Combinations of valid values that no run can have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from offload.config_sections import ZoConfig
from offload.config_values import absolute

if TYPE_CHECKING:
    from offload.config import Config


def impossible(cfg: Config) -> Iterable[str]:
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
