"""The command line, run as a user runs it: exit codes, one message on stderr, nothing written when refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from offload.planner import Budgets, UnitProfile, Workload, load_hardware
from offload.planner.advice import _cases

from offload import report, tables
from offload.config import Config
from offload.rundir import RunDirectory

MODEL = {"architecture": {"model_type": "llama", "hidden_size": 64}}


def offload(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "offload.cli", *arguments],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_help_and_version_load_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom offload.cli import app\n"
        "for a in (['--help'], ['train', '--help'], ['plan', '--help'], ['--version']):\n"
        "    try: app(a)\n    except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("train", "plan", "report", "export", "doctor", "init", "--resume", "--hardware", "offload 0."):
        assert command in done.stdout


def test_no_module_hides_an_entry_point() -> None:
    """Importing a submodule sets it as an attribute of the package, over whatever had its name."""
    import pkgutil

    import offload as package

    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules & set(package.__all__) == {"zo"}  # an entry point that is a module itself


def test_import_is_light_and_names_resolve() -> None:
    code = (
        "import sys, offload\nassert 'torch' not in sys.modules\n"
        "assert offload.Config.load({}).train.steps == 1000 and 'torch' not in sys.modules\n"
        "assert offload.__version__ and set(offload.__all__) <= set(dir(offload))\n"
        "assert callable(offload.wrap) and callable(offload.resume) and callable(offload.plan)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "arguments", "told"),
    [
        ({"train": {"stpes": 1}}, [], "train.stpes: unknown key (got 1); did you mean 'steps'?"),
        ({"memory": {"cpu": "much"}}, [], "memory.cpu: got 'much'"),
        ({}, ["--set", "train.steps=x"], "train.steps: got 'x'"),
        ({"train": {"micro_batch_size": 3}}, [], "train.global_batch_size: got 16"),
    ],
)
def test_a_wrong_config_is_one_message_and_exit_2(
    tmp_path: Path, config: dict[str, Any], arguments: list[str], told: str
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = offload("train", "c.yaml", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in offload("train", "none.yaml", cwd=tmp_path, OFFLOAD_DEBUG="1").stderr


def test_usage_errors_exit_2(tmp_path: Path) -> None:
    assert offload("train", cwd=tmp_path).returncode == 2
    assert offload("train", "c.yaml", "--steps", "-1", cwd=tmp_path).returncode == 2


def test_report_and_export_need_a_run(tmp_path: Path) -> None:
    done = offload("report", ".", cwd=tmp_path)
    assert done.returncode == 2 and "is not a run directory" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_numbers_for_people() -> None:
    spoken = {2640: "44 min 0 s", 5999: "1 h 40 min", 599.7: "600 s", 190: "190 s", 40.8: "40.8 s", 0.0031: "3.1 ms"}
    assert {seconds: tables.duration(seconds) for seconds in spoken} == spoken
    assert [tables.rate(r) for r in (1234.5, 43.1, 5.83, 0.388)] == ["1,234", "43", "5.83", "0.388"]
    assert tables.boundary({"activation": "nvme"}) == "; outputs nvme" and not tables.boundary({"activation": "gpu"})


def test_advice_names_bytes_as_a_config_takes_them() -> None:
    w = Workload((UnitProfile("a", "block", 64, 64, 0),), 1, 1, 512)
    machine = load_hardware("rtx4090")
    for cpu, words in ((1000 << 30, ("2000GiB", "4000GiB")), (768 << 20, ("1.5GiB", "3GiB"))):
        named = [change for kind, change, *_ in _cases(w, Budgets(1 << 30, cpu), machine) if kind == "ram"]
        assert named == [f"memory.cpu of {text}" for text in words]


def test_init_writes_a_config_that_loads(tmp_path: Path) -> None:
    done = offload("init", "--model", "./some: model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cfg = Config.load(tmp_path / "offload.yaml")
    assert cfg.model and cfg.model.path == "./some: model"
    assert cfg.train == Config.load({}).train
    lines = (tmp_path / "offload.yaml").read_text().splitlines()
    assert any(line.strip().startswith("lr: 1.0e-5") and line.endswith("# peak learning rate") for line in lines)
    assert all(len(line) <= 120 for line in lines if " free in " not in line)  # that one ends with a path
    again = offload("init", cwd=tmp_path)
    assert again.returncode == 2 and "already exists" in again.stderr


def test_doctor_measures_the_store_path(tmp_path: Path) -> None:
    done = offload("doctor", "--json", "--store", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    store = found["stores"][0]
    assert store["path"] == str(tmp_path)
    assert store["read_bytes_per_second"] > 0 and store["write_bytes_per_second"] > 0
    assert store["direct_io"] in (True, False)
    backends = found["io_backends"]
    assert set(backends) == {"threads", "io_uring", "libaio", "aiofiles"}
    assert all(item["works"] or item["why"] for item in backends.values())
    assert found["ram"]["total_bytes"] > 0 and backends["threads"]["works"] and backends["aiofiles"]["works"]
    assert found["optimizers"]["adamw"]["parameters_per_second"] > 0 and isinstance(found["advice"], list)
    assert list(tmp_path.iterdir()) == []
    gone = offload("doctor", "--store", "nowhere", cwd=tmp_path)
    assert gone.returncode == 2 and "--store nowhere" in gone.stderr


def _row(step: int) -> dict[str, Any]:
    lanes = {"compute": 0.5, "h2d": 0.1, "d2h": 0.1, "nvme_read": 0.8, "nvme_write": 0.4, "optimizer": 0.2}
    return {
        "step": step, "loss": 5.0 - step * 0.1, "grad_norm": 1.0, "lr": 1e-3, "seconds": 1.0, "tokens": 512,
        "tokens_per_second": 512.0, "lane_seconds": lanes, "busiest_lane": "nvme_read",
        "peak_bytes": {"gpu": 100, "cpu": 200, "cxl": 0, "nvme": 300},
        "io_bytes": {"nvme_read": 14_000_000, "nvme_write": 12_000_000},
    }  # fmt: skip


PLAN = {
    "fits": True, "budget_bytes": {"gpu": 2**30, "cpu": 2**31, "cxl": 0, "nvme": 2**33},
    "peak_bytes": {"gpu": 2**29, "cpu": 2**30, "cxl": 0, "nvme": 2**32}, "categories": {}, "step_seconds": 0.9,
    "tokens_per_second": 560.0, "lane_seconds": _row(1)["lane_seconds"], "busiest_lane": "nvme_read",
    "solver": {"name": "greedy", "status": "optimal", "gap": None, "seconds": 0.01}, "commit_every": 1,
    "units": [
        {"name": f"model.layers.{i}", "parameters": 500_000,
         "placement": {"param": "nvme", "master": "nvme", "exp_avg": "nvme", "exp_avg_sq": "nvme", "grad": "cpu"},
         "activations": {"keep": 0.0, "recompute": 1.0, "swap_cpu": 0.0, "swap_nvme": 0.0}}
        for i in range(2)
    ],
    "layout": {"arena_bytes": 2**20, "lower_bound_bytes": 2**19},
}  # fmt: skip


def _logged_run(tmp_path: Path, steps: int) -> Path:
    """A run directory as a run of `steps` steps leaves it."""
    cfg = Config.load({"model": MODEL, "output": str(tmp_path / "run <1>"), "train": {"steps": 20}})
    with RunDirectory.create(cfg) as run:
        run.write_plan(PLAN)
        for step in range(1, steps + 1):
            run.append_metrics(_row(step))
        if steps:
            run.append_eval({"step": steps, "eval_loss": 3.25})
            run.write_memory(
                {
                    "tiers": {
                        tier: {"budget": PLAN["budget_bytes"][tier], "predicted": PLAN["peak_bytes"][tier],  # type: ignore[index]
                               "peak": 2**28, "categories": {"weights": {"bytes": 1, "peak": 2**27}}}
                        for tier in ("gpu", "cpu", "nvme")
                    },
                    "process": {"pss_peak": 3 * 2**28},
                }
            )  # fmt: skip
            run.write_trace(
                [
                    {"ph": "M", "pid": 1, "tid": 0, "name": "thread_name", "args": {"name": "compute"}},
                    {"ph": "X", "pid": 1, "tid": 0, "name": "forward", "ts": 10.0, "dur": 5.0,
                     "args": {"step": 1, "bytes": 0}},
                ]
            )  # fmt: skip
        return run.path


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_self_contained_file(tmp_path: Path) -> None:
    run = _logged_run(tmp_path, steps=20)
    done = offload("report", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for figure in ("20 of 20", "4.9000 at step 1, 3.0000 at the end", "512 tokens/s", "nvme_read", "3.2500 at step 20"):
        assert figure in done.stdout
    text = (run / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.sections == ["result", "memory", "time", "plan", "ssd", "change"] and not page.open
    assert len(page.addresses) >= 8 and all(a.startswith(("data:image/svg+xml,", "data:,")) for a in page.addresses)
    assert "run &lt;1&gt;" in text
    assert "12.0 bytes" in text and "14.0 bytes" in text  # per parameter and step
    assert "model.layers.0 .. model.layers.1 (2 units)" in text and "nvme; grad cpu" in text
    assert "finished; the loss fell, from 4.9000 to 3.0000" in text
    assert not re.search(r"https?://(?!ui\.perfetto)", text)


@pytest.mark.parametrize("steps", [0, 1])
def test_report_after_a_crash_shows_what_there_is(tmp_path: Path, steps: int) -> None:
    run = _logged_run(tmp_path, steps)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    report.build(run)
    text = (run / "report.html").read_text()
    assert ("stopped at step 1 of 20" if steps else "No step was completed") in text


def test_a_report_of_many_steps_stays_small(tmp_path: Path) -> None:
    run = _logged_run(tmp_path, steps=10_000)
    report.build(run)
    assert (run / "report.html").stat().st_size < 1_000_000
