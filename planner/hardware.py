"""The machine to plan for: presets from data files, a user's file with the same keys, or this machine, measured."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml
from offload.planner.measure import available_ram, probe
from offload.planner.plan import Hardware

__all__ = ["Hardware", "available_ram", "load_hardware", "preset_names", "probe"]

PRESETS = Path(__file__).with_name("presets")
_KEYS = tuple(f.name for f in fields(Hardware))
_REQUIRED = tuple(f.name for f in fields(Hardware) if f.default is MISSING and f.default_factory is MISSING)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_hardware(name_or_file: str | Path, ssds: int = 1) -> Hardware:
    """A preset by name, or a YAML or JSON file with the same keys; `ssds` drives of the given rates, striped.

    Raises ValueError naming what is wrong: an unknown preset (and the nearest), an unreadable file, a missing or
    unknown key (and the nearest), a value of the wrong kind.
    """
    text, names = str(name_or_file), preset_names()
    path = PRESETS / f"{text}.yaml" if text in names else Path(text).expanduser()
    if not path.is_file():
        raise ValueError(
            f"hardware {text!r} is neither a preset nor a file; presets: {', '.join(names)}{_near(text, names)}"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"hardware file {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"hardware file {path} holds a {type(data).__name__}; it must map keys to numbers")
    for key in data:
        if key not in _KEYS:
            raise ValueError(f"hardware file {path}: unknown key {key!r}{_near(str(key), _KEYS)}")
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        raise ValueError(f"hardware file {path}: missing {', '.join(missing)}")
    source = data.get("source") or {}
    if not isinstance(source, dict):
        raise ValueError(f"hardware file {path}: source is {source!r}; it must map keys to texts")
    data["source"] = {str(k): str(v) for k, v in source.items()}
    rates = data["matrix_flops"]
    if isinstance(rates, dict):
        data["matrix_flops"] = {key: _number(value) for key, value in rates.items()}
    hardware = Hardware(**{k: v if k in ("name", "source") else _number(v) for k, v in data.items()})
    return replace(hardware, nvme_read=hardware.nvme_read * ssds, nvme_write=hardware.nvme_write * ssds)


def _number(value: Any) -> Any:
    """What YAML 1.1 leaves as text though it is a number: `7e9` (it wants `7.0e+9`)."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _near(text: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
