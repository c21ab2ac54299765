"""torch.compile of the repeated blocks: each distinct kind of block is compiled once, and all blocks of it use that.

PyTorch keeps what it has compiled by the code of a forward and takes a module's parameters as inputs of the graph. It
checks their shapes, dtypes and strides, never where they lie: blocks whose weights come and go through slots share it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from offload.errors import ConfigError

# One block is few kernels; a pool of compiling processes, one for each core, would take RAM that no plan knows of.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"compile_threads": 1}


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward, compiled when it is first called; what cannot be compiled of it runs as it is."""
    made: Callable[..., Any] = torch.compile(forward, options=_OPTIONS)
    return made


def refuse_without_compilers(device: str) -> None:
    """Raise ConfigError where torch.compile could not build kernels for `device` ("cpu" or "cuda")."""
    missing = []
    if device == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            missing.append(f"a C++ compiler ({compiler})")
    else:
        if importlib.util.find_spec("triton") is None:
            missing.append("the package triton")
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        if not any(map(shutil.which, compilers)):
            missing.append(f"a C compiler ({' or '.join(compilers)})")
    if missing:
        raise ConfigError(
            f"train.compile: got true, but torch.compile on {device} needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not there; accepted here: false"
        )
