"""What can be known wrong about a config on this machine before anything is written: data files, directories, devices.

The model section is checked by building the model (`offload.models`), which comes next and writes nothing either.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from offload.config import Config
from offload.config_sections import CxlConfig
from offload.config_values import absolute, is_local
from offload.errors import ConfigError

_FILES = "a .jsonl, .json, .parquet or .txt file, a directory of them, or a hub data set id"
_PATHS = {
    "path": _FILES,
    "eval_path": _FILES,
    "tokenizer": '"bytes" for the embedded byte tokenizer, a directory with a tokenizer, or a hub id',
}


def check(cfg: Config, *, model_given: bool = False, data_given: bool = False) -> None:
    """Raise ConfigError with every problem this machine has with `cfg`, one line each; nothing is left written.

    `model_given`, `data_given`: a model, or batches, come from the caller, so the sections need not name any.
    """
    found = [
        *_model(cfg, model_given),
        *_data(cfg, data_given),
        *_device(cfg),
        *_cxl(cfg.memory.cxl),
        *_directories(cfg),
        *_report_to(cfg),
    ]
    if found:
        raise ConfigError("\n".join(found))


def _model(cfg: Config, given: bool) -> list[str]:
    if given or (cfg.model and (cfg.model.path or cfg.model.architecture)):
        return []
    return ["model: missing; give model.path (directory or hub id) or model.architecture (fresh random weights)"]


def _data(cfg: Config, given: bool) -> list[str]:
    if not cfg.data:
        return [] if given else ["data: missing; give data.path and data.format"]
    data = cfg.data
    paths = {"path": data.path, "eval_path": data.eval_path}
    if data.tokenizer != "bytes":
        paths["tokenizer"] = data.tokenizer
    found = [
        f"data.{key}: got {path}, which does not exist; accepted: {_PATHS[key]} (relative paths start at {Path.cwd()})"
        for key, path in paths.items()
        if path and is_local(path) and not Path(path).expanduser().exists()
    ]
    fresh = cfg.model and cfg.model.architecture
    if fresh and data.tokenizer is None and data.format != "tokens":
        found.append(f"data.tokenizer: missing, and a model.architecture brings none; accepted: {_PATHS['tokenizer']}")
    return found


def _device(cfg: Config) -> list[str]:
    if cfg.memory.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return ["memory.device: got 'cuda', but PyTorch finds no CUDA device here; accepted: 'cpu' or 'auto'"]
    return []


def _cxl(cxl: CxlConfig | None) -> list[str]:
    if cxl is None or cxl.emulate:
        return []
    from offload.host_tiers import available_nodes

    try:
        available_nodes(cxl)
    except ConfigError as error:
        return [str(error)]
    return []


def _directories(cfg: Config) -> list[str]:
    wanted = {"output": cfg.output}
    for i, entry in enumerate(cfg.memory.nvme or []):
        wanted[f"memory.nvme.{i}.path"] = entry.path
    return [
        f"{key}: got {path}, which cannot be written: {reason}; give a directory you may write to"
        for key, path in wanted.items()
        if (reason := _unwritable(Path(absolute(path))))
    ]


def _unwritable(path: Path) -> str | None:
    """Why no directory can be made or used at `path`; tried for real, with a file that has no name."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is not a directory"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest}: {error.strerror}"


def _report_to(cfg: Config) -> list[str]:
    modules = {"tensorboard": "tensorboard", "wandb": "wandb"}
    return [
        f"train.report_to: got '{name}', but its package is not installed; run: python -m pip install {modules[name]}"
        for name in cfg.train.report_to
        if importlib.util.find_spec(modules[name]) is None
    ]
