"""The plans that README and docs print, made again by the commands that stand above them.

    python -m benchmarks.plans          # rewrites the pages (a minute or two)

`tests/test_docs.py` compares what is printed with what the planner says today.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload.planner import load_hardware
from rich.console import Console

import offload
from offload import tables
from offload.config import Config
from offload.prepare import prepare

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/rtx4090.md")
# A command and its output: in one block after a "$", or in the block after the one that holds the command alone.
_PRINTED = re.compile(
    r"(?P<above>^```\n\$ (?P<one>offload plan [^\n]*)\n|^```\n(?P<other>offload plan [^\n]*)\n```\n\n```text\n)"
    r"(?P<output>.*?)(?=^```$)",
    re.MULTILINE | re.DOTALL,
)


def printed(text: str) -> list[tuple[str, str]]:
    """The commands of a page with the plans printed under them."""
    return [(found["one"] or found["other"], found["output"]) for found in _PRINTED.finditer(text)]


def replaced(text: str, output: Callable[[str], str]) -> str:
    """The page with what `output` says of each command under it."""
    return _PRINTED.sub(lambda found: found["above"] + output(found["one"] or found["other"]), text)


def shown(plan: dict[str, Any]) -> str:
    """What the command prints of a plan in a pipe, without borders and titles."""
    out = io.StringIO()
    Console(file=out, width=110, markup=False).print(tables.plan_tables(plan), tables.verdict(plan))
    lines = []
    for line in out.getvalue().splitlines():
        if line[:1] in ("│", "┃"):
            lines.append(line.replace("┃", "│").rstrip().removesuffix("│").rstrip())
        elif line[:1] not in ("┏", "┡", "├", "└") and line.strip() not in ("Memory", "Time per step", "Units"):
            lines.append(line.rstrip())
    return "".join(f"{line}\n" for line in lines)


def settings(command: str) -> tuple[Config, str]:
    """The config and the hardware of `offload plan FILE --hardware NAME`."""
    _, _, file, option, hardware = shlex.split(command)
    assert option == "--hardware", command
    return Config.load(ROOT / file), hardware


def without_advice(command: str) -> str:
    """What the command prints but for the changes that would help most, which take most of its time."""
    cfg, hardware = settings(command)
    return shown(prepare(cfg, hardware=load_hardware(hardware, ssds=len(cfg.store_paths()))).plan.to_json())


def steady(output: str) -> str:
    """Printed output without what differs from run to run (the solver's seconds) and without the advice."""
    output = re.sub(r"\) in [\d.]+ m?s for", ") for", output)
    return re.sub(r"^what would help.*?(?=^fits)", "", output, flags=re.MULTILINE | re.DOTALL)


def main() -> int:
    made: dict[str, str] = {}

    def output(command: str) -> str:
        if command not in made:
            print(command, file=sys.stderr, flush=True)
            cfg, hardware = settings(command)
            made[command] = shown(offload.plan(cfg, hardware).to_json())
        return made[command]

    for page in PAGES:
        path = ROOT / page
        path.write_text(replaced(path.read_text(encoding="utf-8"), output), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
