"""What is set before PyTorch loads, and what is left to the user."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from offload.environment import DEFAULTS, set_defaults


def test_what_is_unset_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    set_defaults()
    assert {name: os.environ[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "0")])
def test_who_chose_how_threads_wait_keeps_both(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in DEFAULTS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    set_defaults()
    left = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} - {name}
    assert os.environ[name] == value
    assert not any(other in os.environ for other in left)
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_it_loads_no_torch() -> None:
    """It would be too late then."""
    code = "import sys, offload.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
