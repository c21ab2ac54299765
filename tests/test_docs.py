"""README and docs say what is there: the two commands, every config key with its default, every command and option."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from offload.planner.hardware import preset_names

import offload
from benchmarks import plans
from offload import cli, config_reference
from offload.config import Config
from offload.config_keys import section_in
from offload.prepare import prepare
from offload.run_place import DIRECTORIES, FILES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = (
    "python -m pip install -e . -c constraints.txt && offload train examples/quickstart.yaml",
    "python -m pip install -e '.[test]' -c constraints.txt && python -m pytest",
)


def blocks(text: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fences if name == language]


def schema(section: type[Any] = Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf of the schema, dotted, with its field."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
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


def test_the_config_reference_is_what_the_schema_says() -> None:
    same = TEXT["config.md"] == config_reference.page()
    assert same, "docs/config.md is not today's: run python -m offload.config_reference > docs/config.md"


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
        if not right or not field.description:
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
    plan = prepare(Config.load(ROOT / "examples" / "quickstart.yaml", ["memory.device=cpu"])).plan
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


def test_printed_plans_are_what_the_planner_says_today() -> None:
    if torch.cuda.is_available():
        pytest.skip("the printed plans were profiled without a CUDA device")
    told = [pair for page in plans.PAGES for pair in plans.printed(TEXT[Path(page).name])]
    assert len(told) >= 4
    today = {command: plans.without_advice(command) for command in dict(told)}
    for command, output in told:
        assert plans.steady(output) == plans.steady(today[command]), f"{command}: run python -m benchmarks.plans"


def test_every_file_of_a_run_is_documented() -> None:
    missing = [
        name for name in (*FILES, *(f"{d}/" for d in DIRECTORIES), "model/") if f"`{name}`" not in TEXT["files.md"]
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


def test_the_snippet_of_the_io_layer_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks(TEXT["io.md"], "python")[0], "io.md", "exec"), {"__name__": "io.md"})
    assert f"prints `{capsys.readouterr().out.strip()}`." in TEXT["io.md"]


# ---- every command and snippet is run ----

# What the pages call the user's own: made small in the workspace, so that the commands run as they are written.
MODEL = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 272, "tie_word_embeddings": False,
}  # fmt: skip
# Run by other tests, or in the set-up of a machine: a new environment, the whole suite, tools of the repository.
ELSEWHERE = re.compile(
    r"pip install|pytest|python -m benchmarks|python3? -m venv|ruff|mypy|^root=|^ln |^cd |python_loop.py|git "
    r"|offload init --model"
)


def commands() -> list[str]:
    """Every line of a shell block of the pages that starts a program, once, in order, without its comment."""
    found: dict[str, None] = {}
    for page, text in sorted(TEXT.items(), key=lambda item: (item[0] != "quickstart.md", item[0])):
        if page == "CONTRIBUTING.md":
            continue
        for block in (*blocks(text, ""), *blocks(re.sub(r"^ {3}", "", text, flags=re.MULTILINE), "")):
            for line in (part for whole in block.splitlines() for part in whole.split("#")[0].split("&&")):
                line = line.strip().removeprefix("$ ")
                if re.match(r"(offload|python) ", line) and not ELSEWHERE.search(line):
                    found[line] = None
    return list(found)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the examples, a model of the user's own, and two short runs under the names the pages use."""
    import shutil

    from transformers import Qwen3Config, Qwen3ForCausalLM

    place = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "examples", place / "examples")
    torch.manual_seed(0)
    settings = {key: value for key, value in MODEL.items() if key != "model_type"}
    Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(place / "Qwen3-8B")
    shutil.copy(ROOT / "examples" / "chat.jsonl", place / "data.jsonl")
    own = yaml.safe_load(blocks(TEXT["README.md"], "yaml")[0])
    own["data"] |= {"tokenizer": "bytes", "sequence_length": 64}
    own["train"] |= {"steps": 1, "global_batch_size": 2}
    own["memory"] = {"device": "cpu", "cpu": "600MiB", "nvme": [{"path": "store", "size": "1GiB"}]}
    (place / "qwen3.yaml").write_text(yaml.safe_dump(own))
    return place


def run_here(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process, made quick: trainings take one step, models have two blocks, `doctor` few bytes."""
    arguments = shlex.split(line.replace("/mnt/nvme0/offload", str(place / "store")))[1:]
    more = {
        "train": ["--yes", "--steps", "1", "--set", "train.schedule.warmup_steps=0", "--set", "planner.solver=greedy"],
        "plan": ["--set", "planner.solver=greedy", "--set", "model.architecture.num_hidden_layers=2"],
    }
    monkeypatch.chdir(place)
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    monkeypatch.setattr("offload.doctor.MEASURED", 16 << 20)
    code = cli.app([*arguments, *more.get(arguments[0], [])], standalone_mode=False)
    # The plans that the pages show fit; of those with a setting changed some may not, which is an answer too.
    accepted = (0, None, 3) if arguments[0] == "plan" and "--set" in arguments else (0, None)
    assert code in accepted, (line, code)


@pytest.mark.timeout(600)  # some forty commands, a minute on two cores with nothing beside them
def test_every_command_of_the_pages_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = commands()
    assert len(lines) > 12
    trained = [line for line in lines if line.startswith("offload train ") and "--resume" not in line]
    programs = [line for line in lines if line.startswith("python ")]
    rest = [line for line in lines if line not in (*trained, *programs)]
    cut = ["examples/quickstart.yaml", "2"]  # steps
    started = {  # beside the commands that run in this process
        line: subprocess.Popen(
            [sys.executable, *shlex.split(line)[1:], *(cut if "examples/" in line else [])],
            cwd=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for line in programs
    }  # fmt: skip
    for line in [*trained, *(line for line in rest if "--resume" in line), *(x for x in rest if "--resume" not in x)]:
        run_here(line, workspace, monkeypatch)
    for line, program in started.items():
        _, errors = program.communicate(timeout=200)
        assert program.returncode == 0, (line, errors)
    assert (workspace / "runs" / "quickstart" / "compare.html").is_file()
    assert (workspace / "runs" / "qwen3-8b" / "report.html").is_file()


def test_python_snippets_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(workspace)
    config = {
        "model": {"path": "./Qwen3-8B", "dtype": "float32"},
        "train": {"steps": 2, "global_batch_size": 2, "schedule": {"warmup_steps": 0}},
        "memory": {"device": "cpu", "cpu": "600MiB"},
    }
    ids = torch.arange(32).reshape(2, 16)
    loader = [{"input_ids": ids, "labels": ids}] * 2
    for number, (page, snippet) in enumerate((n, b) for n, t in TEXT.items() for b in blocks(t, "python")):
        if page in ("README.md", "api.md", "zeroth_order.md"):  # tests/test_io_inspect.py runs those of storage.md
            run = f"runs/snippet-{number}"
            names: dict[str, Any] = {
                "model": AutoModelForCausalLM.from_pretrained("Qwen3-8B", dtype=torch.float32),
                "config": config | {"output": run}, "loader": loader, "batch": loader[0], "out": run,
            }  # fmt: skip
            snippet = snippet.replace('"out"', f'"{run}-out"')
            if "offload.wrap(" in snippet:
                last = run
            exec(compile("import offload\n" + snippet.replace("runs/my-run", last), page, "exec"), names)
            if "engine" in names:
                names["engine"].close()
