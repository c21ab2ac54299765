"""Fine-tune models bigger than your machine. `import offload` is light: names load what they need when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.api import plan, resume, wrap
    from offload.config import Config
    from offload.engine import micro_seed

__version__: str
__all__ = ["Config", "__version__", "micro_seed", "plan", "resume", "wrap", "zo"]

_HOME = {
    "Config": "offload.config",
    "micro_seed": "offload.engine",
    "plan": "offload.api",
    "resume": "offload.api",
    "wrap": "offload.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("offload")
    if name == "zo":
        return importlib.import_module("offload.zo")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'offload' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
