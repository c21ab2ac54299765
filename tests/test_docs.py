"""README and docs say what is there: the two commands, every config key with its default, every command and option."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from offload.planner.hardware import preset_names

import offload
from offload import cli
from offload.config import Config
from offload.configfile import _model_in
from offload.rundir import _DIRECTORIES, _FILES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = (
    "python -m pip install -e . -c constraints.txt && offload train examples/quickstart.yaml",
    "python -m pip install -e '.[test]' -c constraints.txt && python -m pytest",
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def schema(section: type[Any] = Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf of the schema, dotted, with its field."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is None or name in ("cxl", "nvme"):
            found[prefix + name] = field
        if inner is not None:
            found |= schema(inner, f"{prefix}{name}.")
    return found


def documented() -> dict[str, str]:
    """Keys of the tables in docs/config.md with the text of their default."""
    rows = re.findall(r"^\| `([a-z][\w.\[\]]*)` \| (\S.*?) \|", TEXT["config.md"], re.MULTILINE)
    return {key.replace("[]", ""): default for key, default in rows if "." in key or key == "output"}


def options() -> dict[str, set[str]]:
    """Every command with its long options."""
    group: Any = typer.main.get_command(cli.app)
    return {
        name: {o for p in command.params for o in p.opts if o.startswith("--")} | {"--help"}
        for name, command in group.commands.items()
    }


def test_the_two_commands_of_the_readme() -> None:
    lines = [line.split("#")[0].strip() for line in blocks(TEXT["README.md"], "")[0].splitlines()]
    assert tuple(lines) == COMMANDS
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(command in ci for command in COMMANDS)


def test_every_config_key_is_documented_with_its_default() -> None:
    fields, rows = schema(), documented()
    assert rows.keys() == fields.keys()
    wrong = {}
    for key, text in rows.items():
        field = fields[key]
        if field.is_required():
            right = text == "*required*"
        else:
            default = field.get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            shown = yaml.safe_load(text.strip("`"))
            right = shown == default and isinstance(shown, bool) == isinstance(default, bool)
        if not right:
            wrong[key] = text
    assert not wrong


def test_every_accepted_word_is_documented() -> None:
    for key, field in schema().items():
        words = [
            w for group in re.findall(r"Literal\[(.*?)\]", str(field.annotation)) for w in re.findall(r"\w+", group)
        ]
        lines = TEXT["config.md"].splitlines()
        row = next(line for line in lines if line.replace("[]", "").startswith(f"| `{key}` |"))
        assert all(f"`{word}`" in row for word in words), (key, words)


@pytest.mark.parametrize(("page", "text"), [(n, b) for n, t in TEXT.items() for b in blocks(t, "yaml")])
def test_config_snippets_load(page: str, text: str) -> None:
    Config.load(yaml.safe_load(text))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_load_and_their_files_exist(path: Path) -> None:
    cfg = Config.load(path)
    assert cfg.data is not None and (ROOT / cfg.data.path).is_file()


def test_the_quickstart_streams_state_from_disk() -> None:
    plan = offload.plan(Config.load(ROOT / "examples" / "quickstart.yaml", ["memory.device=cpu"]))
    assert plan.fits and "nvme" in {unit.placement["exp_avg"] for unit in plan.units}


def test_the_worked_config_is_the_example() -> None:
    readme = Config.load(yaml.safe_load(blocks(TEXT["README.md"], "yaml")[0]))
    example = Config.load(ROOT / "examples" / "qwen3-8b.yaml")
    assert readme.train == example.train and readme.memory == example.memory
    assert readme.data and example.data and readme.data.sequence_length == example.data.sequence_length


def test_every_command_and_option_that_is_named_exists() -> None:
    known = options()
    named: dict[str, set[str]] = {name: set() for name in known}
    for page, text in TEXT.items():
        fragments = [*re.findall(r"`([^`\n]+)`", text), *blocks(text, "")]
        for line in (line for fragment in fragments for line in fragment.splitlines()):
            for command, rest in re.findall(r"(?:^|\s)offload ([a-z]+)([^#|]*)", line.partition("#")[0]):
                assert command in known, f"{page}: offload {command}"
                found = set(re.findall(r"(?<!\S)--[a-z]+", rest))
                assert found <= known[command], f"{page}: offload {command} {found - known[command]}"
                named[command] |= found
    for line in TEXT["README.md"].splitlines():  # the table of commands
        if row := re.match(r"\| `offload ([a-z]+)[^`]*` \| (.*) \|$", line):
            found = set(re.findall(r"`(--[a-z]+)", row[2]))
            assert found <= known[row[1]]
            named[row[1]] |= found
    assert {name: found - {"--help"} for name, found in known.items()} == {
        name: found - {"--help"} for name, found in named.items()
    }
    assert all(f"`{preset}`" in TEXT["README.md"] for preset in preset_names())


def test_every_file_of_a_run_is_documented() -> None:
    missing = [
        name for name in (*_FILES, *(f"{d}/" for d in _DIRECTORIES), "model/") if f"`{name}`" not in TEXT["files.md"]
    ]
    assert not missing


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT[page.name]):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for target in re.findall(r"`((?:examples|tests|planner|docs|benchmarks)/[\w./-]+\.\w+)`", TEXT[page.name]):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_python_snippets_use_names_that_exist() -> None:
    for text in TEXT.values():
        for snippet in blocks(text, "python"):
            compile(snippet, "snippet", "exec")
            assert all(hasattr(offload, name) for name in re.findall(r"\boffload\.([a-z_]\w*)", snippet))


def test_the_python_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "python_loop.py"), str(tmp_path / "run")],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"^step \d+  loss (\S+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
