"""Reports of runs that ended badly, and of files that are missing: each part that can be told is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import offload
from offload import compare, report, run_data
from offload.rundir import read_jsonl

ROOT = Path(__file__).parent.parent
# RAM for the buffers and hardly more: whatever this machine's rates, weights are read from the store in the first step.
LITTLE = "157 MiB"
SECTIONS = ["result", "memory", "time", "plan", "ssd", "change"]


def text_of(run: Path) -> str:
    report.build(run)
    text = (run / "report.html").read_text()
    assert [part.split('"')[0] for part in text.split('<section id="')[1:]] == SECTIONS
    return text


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart that was killed after its second step, before any other writing of its logs was due."""
    place = tmp_path_factory.mktemp("killed")
    run = place / "run"
    sets = [f"data.path={ROOT}/examples/quickstart.txt", "output=run", "memory.nvme.0.path=store", "train.steps=5000",
            "planner.activations=recompute", f"memory.cpu={LITTLE}"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "offload.cli", "train", str(ROOT / "examples" / "quickstart.yaml"), "--yes",
         *[part for s in sets for part in ("--set", s)]],
        cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while len(list(read_jsonl(run / "metrics.jsonl"))) < 2:
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
            time.sleep(0.02)
        going = run_data.load(run)
        assert going.process == str(process.pid)
        assert f"is going on in process {process.pid}" in report.summary(going)["state"]
    finally:
        process.kill()
        process.communicate()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4000, "lo')
    return run


def test_what_to_change_is_planned_with_the_report(killed: Path, tmp_path: Path) -> None:
    """Of a run without advice: planned now, within the run's own budgets, or told why not."""
    run = shutil.copytree(killed, tmp_path / "run", ignore=shutil.ignore_patterns("lock"))
    plan = json.loads((run / "plan.json").read_text())
    assert plan["advised"]  # 5000 steps are worth it before they begin
    (run / "plan.json").write_text(json.dumps({**plan, "advice": [], "advised": False}))
    assert "No change was planned: offload report RUN_DIR does it." in text_of(run)
    found = report.build(run, advise=True).plan
    assert found["advised"] and found["budget_bytes"] == plan["budget_bytes"]
    text = (run / "report.html").read_text()
    assert "No change was planned" not in text
    assert all(a["change"] in text for a in found["advice"]) and "a device twice as fast" in text
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"path": str(tmp_path / "gone")}}))
    report.build(run, advise=True)
    assert "No change was planned: the run cannot be planned again here: " in (run / "report.html").read_text()
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": None}))
    report.build(run, advise=True)
    assert "came from a program" in (run / "report.html").read_text()


def test_a_killed_run_has_all_but_what_came_last(killed: Path) -> None:
    text = text_of(killed)
    rows = list(read_jsonl(killed / "metrics.jsonl"))
    last = rows[-1]["step"]
    assert f"stopped at step {last} of 5000: it ended without a word (killed" in text and "--resume goes on" in text
    assert "goes on after the last committed step" in text
    assert "RAM: this process" in text and "operations on each lane over one step" in text  # of the first step
    assert f"memory.json was last written after step 1, and the run got to step {last}." in text
    assert "What compute waited for" in text and "achieved while busy" in text
    links = report._links({"nvme_read": 1e9}, run_data.one_step(run_data.load(killed).trace)[2])
    moved = json.loads((killed / "trace.json").read_text())
    first = sum(e["args"]["bytes"] for e in moved if e["args"].get("step") == 1 and e["ph"] == "X" and e["tid"] == 3)
    assert first == rows[0]["io_bytes"]["nvme_read"] > 0
    assert next(link for link in links if link["name"] == "nvme_read")["moved"].endswith("iB")


def test_endurance_is_of_each_rated_drive_since_the_run_was_made(killed: Path) -> None:
    """Not of all that was written, and of earlier processes of the run too."""
    data = run_data.load(killed)
    (plain,) = data.memory["drives"]
    assert plain["tbw"] is None and "not known" in report._endurance(data)["rated endurance"]
    rated = {"path": "/a", "written": 3 * 10**9, "tbw": 0.03, "used_share": 0.1}
    other = {"path": "/b", "written": 9 * 10**9, "tbw": None, "used_share": None}
    (data.info["store"]["paths"][0])["tbw"] = 0.03
    row = {**data.rows[0], "seconds": 8640.0, "io_bytes": {"nvme_read": 0, "nvme_write": 4 * 10**6}}
    found = report._endurance(replace(data, rows=[row, row], memory={**data.memory, "drives": [rated, other]}))
    # A quarter of the bytes are its own: 1 MB a step, 27 GB are left.
    assert found == {
        "of the rated endurance, /a": "10.000% of 0.03 TB",
        "the rest of it lasts, /a": "27,000 such steps, 2,700 days of them",
    }


@pytest.mark.parametrize("gone", [["memory.json"], ["trace.json", "plan.json"], []])
def test_a_missing_file_is_named_where_its_figures_would_be(killed: Path, tmp_path: Path, gone: list[str]) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run", ignore=shutil.ignore_patterns("cache")))
    names = gone or ["memory.json", "trace.json", "plan.json", "metrics.jsonl"]  # in the last case: all
    for name in names:
        (run / name).unlink()
    text = text_of(run)
    for name in names:
        assert f"{name}: " in text and f"so {report._LOST[name]}" in text
    if gone == ["memory.json"]:  # peaks and budgets are known from the other files
        assert 'data-tier="nvme" data-peak="' in text and LITTLE in text
    assert ("No step was completed. The run ended without a word" in text) == ("metrics.jsonl" in names)
    (run / "memory.json").write_text('{"tiers": ')
    (run / "plan.json").write_text("[]")
    text = text_of(run)
    assert "memory.json: it cannot be read: " in text and "plan.json: it is no JSON object" in text


def config(path: Path, **train: Any) -> dict[str, Any]:
    return {
        "model": {
            "architecture": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "vocab_size": 64, "tie_word_embeddings": False,
            },
            "dtype": "float32",
        },
        "data": {"path": "none.jsonl", "sequence_length": 16},
        "train": {"steps": 4, "micro_batch_size": 2, "global_batch_size": 2, "schedule": {"name": "constant"}, **train},
        "memory": {"device": "cpu", "cpu": "400MiB"},
        "planner": {"activations": "recompute"},
        "output": str(path),
    }  # fmt: skip


BATCH = {"input_ids": torch.arange(32).reshape(2, 16), "labels": torch.arange(32).reshape(2, 16)}


def test_an_exception_in_a_loop_of_ones_own_is_in_the_report(fast_path: Path) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the <block> is broken")

    run = fast_path / "own"
    with pytest.raises(ValueError, match="is broken"), offload.wrap(None, config(run)) as engine:
        engine.step(BATCH)
        engine.model.model.layers[1].mlp.forward = broken
        engine.step(BATCH)
    text = text_of(run)
    assert "stopped at step 1 of 4: it failed, as told below" in text
    assert "ValueError: the &lt;block&gt; is broken" in text and "RAM: this process" in text


def test_runs_of_other_length_model_and_method_are_compared(killed: Path, fast_path: Path) -> None:
    with offload.wrap(None, config(fast_path / "zo", method="zo")) as engine:
        engine.step(BATCH)
        assert all(unit.placement.keys() == {"param", "activation"} for unit in engine.plan.units)
        engine.run.append_eval({"step": 1, "eval_loss": 2.5})
    assert "grad" not in report.build(fast_path / "zo").plan["units"][0]["placement"]
    (fast_path / "zo" / "trace.json").unlink()
    (fast_path / "zo" / "memory.json").unlink()
    assert "goes on after the last step logged in zo.jsonl" in report.summary(run_data.load(fast_path / "zo"))["state"]
    page, figures, settings = compare.build(killed, fast_path / "zo")
    told = {line.name: line for line in figures}
    rows = [list(read_jsonl(path / "metrics.jsonl")) for path in (killed, fast_path / "zo")]
    assert told["steps"].first == str(rows[0][-1]["step"]) and told["steps"].second == "1"
    assert told["loss at step 1"].first == f"{rows[0][0]['loss']:.6g}"
    assert told["loss at step 1"].second == f"{rows[1][0]['loss']:.6g}"
    assert (told["eval loss, last"].first, told["eval loss, last"].second) == ("-", "2.5")
    assert told["RAM of the process, peak (PSS)"].second == "-" and not told["RAM of the process, peak (PSS)"].ratio
    assert all(line.second == "-" for name, line in told.items() if name.startswith("waits for"))
    assert {line.name for line in settings} >= {"train.method", "model.architecture.hidden_size", "train.steps"}
    assert "memory.json: it was not written" in page.read_text()


def test_doctor_on_a_machine_with_nothing_but_the_package(tmp_path: Path) -> None:
    """Packages that are missing are named with what to do, and nothing fails."""
    program = (
        "import sys\n"
        "for name in ('numba', 'deepspeed', 'liburing'): sys.modules[name] = None\n"
        "from offload.cli import main\nsys.argv = ['offload', 'doctor', '--json']\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["io_backends"]["threads"]["works"]
    assert "the package deepspeed is not installed" in found["io_backends"]["libaio"]["why"]
    assert "the package liburing does not load" in found["io_backends"]["io_uring"]["why"]
    assert found["optimizers"]["compiled_kernels"]["why"].startswith("numba is not installed")
    assert found["optimizers"]["adamw_bfloat16"]["parameters_per_second"] > 0
    assert any(line.startswith("numba is not installed") for line in found["advice"])
