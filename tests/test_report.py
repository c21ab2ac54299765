"""The report of a real run: its figures are those of the logs, its parts add up, and a browser shows it whole."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from offload.io import Ledger
from rich.console import Console

from offload import compare, progress, report, report_memory
from offload.memory_record import MemoryRecord
from offload.rundir import RunDirectory, read_jsonl
from offload.tables import size
from offload.trace import LANES, Trace

ROOT = Path(__file__).parent.parent
SECTIONS = ["result", "memory", "time", "plan", "ssd", "change"]
STEPS = 4


def train(directory: Path, name: str, *more: str) -> Path:
    sets = [f"output={name}", f"train.steps={STEPS}", f"memory.nvme.0.path={name}-store", "train.global_batch_size=2"]
    sets += ["planner.activations=recompute", *more]  # one plan, whatever the machine's rates are
    done = subprocess.run(
        [sys.executable, "-m", "offload.cli", "train", str(ROOT / "examples" / "quickstart.yaml"), "--yes",
         *[part for s in (f"data.path={ROOT}/examples/quickstart.txt", *sets) for part in ("--set", s)]],
        cwd=directory, env=os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory / name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short quickstart that logs to TensorBoard and Weights & Biases where they are installed."""
    trackers = [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name)]
    return train(tmp_path_factory.mktemp("report"), "one", f"train.report_to={trackers}")


class Page(HTMLParser):
    """Sections, cells with exact figures, and the JSON block of a report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.cells: list[dict[str, str | None]] = []
        self.figures = ""
        self._in_figures = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.sections.append(values["id"] or "")
        if any(key.startswith("data-") for key in values):
            self.cells.append(values)
        self._in_figures = values.get("id") == "figures" and tag == "script"

    def handle_data(self, data: str) -> None:
        if self._in_figures:
            self.figures += data

    def handle_endtag(self, tag: str) -> None:
        self._in_figures = False


def test_figures_are_those_of_the_logs(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert page.sections == SECTIONS
    rows = list(read_jsonl(run / "metrics.jsonl"))
    memory = json.loads((run / "memory.json").read_text())
    figures = json.loads(page.figures)
    assert figures["step"] == STEPS == len(rows) and figures["loss"] == rows[-1]["loss"]
    assert figures["tokens_per_second_median"] == statistics.median(r["tokens_per_second"] for r in rows[1:])
    assert figures["pss_peak"] == memory["process"]["pss_peak"]
    told = {(c["data-tier"], k): int(c[f"data-{k}"] or 0) for c in page.cells if "data-tier" in c
            for k in ("peak", "predicted", "budget") if f"data-{k}" in c}  # fmt: skip
    assert told == {
        (tier, k): f[k] for tier, f in memory["tiers"].items() if f["budget"] for k in ("peak", "predicted", "budget")
    }


def test_the_parts_of_memory_add_up_to_the_measured_peak(run: Path) -> None:
    memory = json.loads((run / "memory.json").read_text())
    (whole,) = report_memory.section(memory, {})["parts"]
    assert whole["bytes"] == memory["process"]["pss_peak"] > 0
    assert abs(sum(row["bytes"] for row in whole["rows"]) - whole["bytes"]) <= 0.01 * whole["bytes"]
    units = [unit["name"] for unit in json.loads((run / "plan.json").read_text())["units"]]
    peak = memory["process"]["at_peak"]
    if peak["step"] == 0:
        assert peak["during"] == "before the first step"
    else:
        work = f"(forward|backward) of ({'|'.join(map(re.escape, [*units, 'the start', 'the loss']))})"
        waiting = "waiting for [a-z ]+: .+"
        assert re.fullmatch(f"(after )?{work}|{waiting}|before the first unit|after its end", peak["during"])
        assert 1 <= peak["step"] <= STEPS
    told, budget = report_memory.peaks(memory)[0], memory["tiers"]["cpu"]["budget"] + memory["process"]["before"]
    assert f"(PSS): {'step ' if peak['step'] else ''}" in told
    assert f"{size(peak['bytes'])} of {size(budget)}, of which " in told
    for tier, named in memory["reserved"].items():
        assert named["bytes"] == memory["tiers"][tier]["peak"] == sum(named["categories"].values())
    gpu = memory["reserved"]["gpu"]
    # Every step holds as much as the first: with the boundaries of all units kept, when the head comes to the loss.
    assert (gpu["step"], gpu["during"]) == (1, "after forward of lm_head")
    assert gpu["categories"]["activations"] > 0
    assert "gpu: step 1, after forward of lm_head: " in "\n".join(report_memory.peaks(memory))


def test_one_step_in_stacks(run: Path) -> None:
    memory = json.loads((run / "memory.json").read_text())
    assert [step["step"] for step in memory["steps"]] == [1, STEPS]
    for step in memory["steps"]:
        moments = len(step["at"])
        assert moments > 10 and step["at"] == sorted(step["at"])
        activations = step["tiers"]["gpu"]["activations"]
        assert len(activations) == moments and activations[-1] == 0 and max(activations) > 0
        assert all(len(v) in (1, moments) for held in step["tiers"].values() for v in held.values())
    titles = [panel["title"] for panel in report_memory.section(memory, {})["panels"]]
    assert titles[0].startswith("RAM: this process") and titles[1].startswith("Device") and titles[2] == "SSD"


def test_links_stalls_predictions_and_advice(run: Path) -> None:
    plan = report.build(run, advise=True).plan
    text = (run / "report.html").read_text()
    rates = json.loads((run / "memory.json").read_text())["rates"]
    assert set(rates) == {"h2d", "d2h", "nvme_read", "nvme_write"} and all(rate > 0 for rate in rates.values())
    for words in ("achieved while busy", "nvme_read", "What compute waited for", "seconds per step", "RAM peak"):
        assert words in text
    assert plan["advised"] and any("twice as fast" in a["change"] for a in plan["advice"])  # its steps are computed
    assert all(a["change"] in text for a in plan["advice"])


def test_files_of_ten_thousand_steps_stay_small(run: Path, tmp_path: Path) -> None:
    """All files of a run but its model and data: its rows, ten thousand of them, and a trace of many operations."""
    long = shutil.copytree(run, tmp_path / "long", ignore=shutil.ignore_patterns("model", "cache", "wandb"))
    rows = list(read_jsonl(run / "metrics.jsonl"))
    with RunDirectory.open(long) as directory:
        for step in range(STEPS + 1, 10_001):
            directory.append_metrics(rows[step % STEPS] | {"step": step})
            if step % 100 == 0:
                directory.append_eval({"step": step, "eval_loss": rows[step % STEPS]["loss"]})
        trace = Trace()
        for i in range(100_000):
            begin, seconds = i / 1e3, i % 7 * 1e-4 + 1e-5
            trace.add(LANES[i % 6], f"model.layers.{i % 100}/exp_avg_sq", begin, begin + seconds, 16 << 20)
        trace.end_step(10_000)
        directory.write_trace(trace.events())
    report.build(long)
    sizes = {path.name: path.stat().st_size for path in long.iterdir() if path.is_file()}
    assert sum(sizes.values()) < 5e6, sizes
    events = json.loads((long / "trace.json").read_text())
    assert sum(event["args"].get("bytes", 0) for event in events) == 100_000 << 24


def test_a_reading_costs_little_of_a_second() -> None:
    """At its interval, what watching memory takes is under a hundredth of the time."""
    ledger, trace = Ledger(), Trace()
    with MemoryRecord(ledger, trace, "cpu") as record:
        record._next_pss = float("inf")  # the sum over the pages has a share of its own, SHARE
        begin = time.thread_time()
        for _ in range(200):
            record.read()
        each = (time.thread_time() - begin) / 200
    from offload import memory_record

    assert each / memory_record.INTERVAL + memory_record.SHARE < 0.01, each


def test_peaks_between_two_readings_are_seen() -> None:
    """A tensor that lives shorter than the interval is in the high-water mark, and its moment is named."""
    ledger, trace = Ledger(), Trace()
    record = MemoryRecord(ledger, trace, "cpu")  # its thread never started: readings where this test takes them
    record.read()
    with record.during(7), trace.span("compute", "backward of layer 3"):
        block = torch.ones(64 << 18)  # 64 MiB
        del block
        record.read()
    told = record.to_json()["process"]
    assert told["at_peak"]["step"] == 7 and told["at_peak"]["during"] == "backward of layer 3"
    assert told["pss_peak"] - told["before"] > 56 << 20


def test_two_runs_side_by_side(run: Path) -> None:
    other = train(run.parent, "two", "train.max_grad_norm=null", "train.schedule.warmup_steps=1")
    page, figures, settings = compare.build(run, other)
    lines = {line.name: line for line in figures}
    rows = [list(read_jsonl(path / "metrics.jsonl")) for path in (run, other)]
    assert lines[f"loss at step {STEPS}"].first == f"{rows[0][-1]['loss']:.6g}"
    assert lines[f"loss at step {STEPS}"].second == f"{rows[1][-1]['loss']:.6g}"
    assert {line.name for line in settings} >= {"train.max_grad_norm", "train.schedule.warmup_steps"}
    text = page.read_text()
    assert page == run / "compare.html" and text.count("data:image/svg+xml,") >= 3
    assert "train.max_grad_norm" in text and "waits for" in text
    shown = io.StringIO()
    Console(file=shown, width=140).print(compare.table("one", "two", figures, settings))
    assert "tokens per second" in shown.getvalue()


def test_tensorboard_has_the_trainers_names(run: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = list(read_jsonl(run / "metrics.jsonl"))
    for name, key in (("train/loss", "loss"), ("train/learning_rate", "lr"), ("train/grad_norm", "grad_norm")):
        logged = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in logged] == list(range(1, STEPS + 1))
        assert [v for _, v in logged] == pytest.approx([row[key] for row in rows], rel=1e-6)


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    from offload.config import Config
    from offload.rundir import RunDirectory
    from offload.trackers import open_trackers, train_values

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = Config.load({"output": str(tmp_path / "run"), "train": {"report_to": ["wandb"]}})
    with RunDirectory.create(cfg) as directory:
        (tracker,) = open_trackers(cfg, directory, 0)
        tracker.log(train_values({"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 10.0}), 1)
        tracker.close()
        (log,) = (directory.path / "wandb").glob("offline-run-*/run-*.wandb")
        names = (b"train/loss", b"train/learning_rate", b"train/grad_norm")
        deadline = time.monotonic() + 20  # written by a process of wandb's own
        while not all(name in log.read_bytes() for name in names):
            assert time.monotonic() < deadline, [name for name in names if name not in log.read_bytes()]
            time.sleep(0.1)


ROW = {
    "step": 3, "loss": 2.5, "seconds": 2.0, "tokens_per_second": 512.0, "busiest_lane": "nvme_read",
    "lane_seconds": {"compute": 0.5, "nvme_read": 1.5}, "peak_bytes": {"gpu": 2**30, "cpu": 3 * 2**30, "nvme": 0},
}  # fmt: skip
STALLS = {"weights": 0.5}


@pytest.mark.parametrize("width", [100, 40])
def test_live_progress_shows_lanes_and_tiers(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.delenv("CI", raising=False)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, _environ={"TERM": "xterm"})
    shown = progress.open_progress(
        console, 2, 10, {"gpu": 2 * 2**30, "cpu": 2 * 2**30}, lambda: "forward of model.layers.3"
    )
    shown.step(ROW, STALLS, ram=int(3.5 * 2**30))
    shown.note("a note [with brackets]")
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert max(len(line) for line in re.split(r"[\r\n]", text)) <= width
    words = " ".join(text.split())
    assert "step 3/10 loss 2.5000 512 tokens/s eta" in words and "75%" in words and "a note [with brackets]" in words
    assert "25%, mostly for weights" in words and "now: forward of model.layers.3" in words
    assert "1 GiB of 2 GiB" in words and "3.5 GiB of 2 GiB" in words


@pytest.mark.parametrize("where", ["pipe", "ci", "dumb"])
def test_plain_progress_elsewhere(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true" if where == "ci" else "")
    out = io.StringIO()
    terminal = {"TERM": "dumb" if where == "dumb" else "xterm"}
    console = Console(file=out, force_terminal=where != "pipe", width=100, _environ=terminal)
    shown = progress.open_progress(console, 2, 10, {"gpu": 2**30})
    shown.step(ROW, STALLS)
    shown.close()
    assert out.getvalue().startswith("step 3/10  loss 2.5000  512 tokens/s  2.00 s  busiest nvme_read 75%")
    assert "\x1b[?25l" not in out.getvalue()


# ---- in a browser ----


def browser() -> str:
    found = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if found is None:
        pytest.skip("no browser found (chromium, chromium-browser, google-chrome)")
    return found


MEASURE = """<script>
addEventListener("load", () => {
  const images = [...document.querySelectorAll("img")];
  const told = {
    width: innerWidth, overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    sections: [...document.querySelectorAll("section")].filter(s => s.offsetHeight > 40).map(s => s.id),
    images: images.length, shown: images.filter(i => i.complete && i.naturalWidth > 0).length,
    font: Math.min(...[...document.querySelectorAll("td, p, li")].map(e => parseFloat(getComputedStyle(e).fontSize))),
    figures: JSON.parse(document.getElementById("figures").textContent),
  };
  const out = document.createElement("pre"); out.id = "told"; out.textContent = JSON.stringify(told);
  document.body.append(out);
});
</script>"""


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    """No message in the console, every section and picture there, nothing wider than the window."""
    page = tmp_path / "page.html"
    page.write_text((run / "report.html").read_text().replace("</body>", MEASURE + "</body>"))
    frame = tmp_path / "frame.html"  # a window is at least 500 pixels wide: the narrow page is shown in a frame
    frame.write_text(
        f'<iframe src="page.html" width="{width}" height="900" style="border:0" '
        'onload="setTimeout(() => {const d = this.contentDocument;'
        'document.body.append(d.getElementById(\'told\').cloneNode(true))}, 0)"></iframe>'
    )
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--window-size=1400,1000", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path}/profile", "--dump-dom",
        frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    told: dict[str, Any] = json.loads(re.findall(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[-1])
    assert told["width"] == width and told["overflow"] <= 0
    assert told["sections"] == SECTIONS
    assert told["images"] == told["shown"] >= 7
    assert told["font"] >= 14
    assert told["figures"]["loss"] == list(read_jsonl(run / "metrics.jsonl"))[-1]["loss"]


def test_the_map_shows_every_share_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    activations = {"keep": 0.5, "recompute": 0.25, "swap_cpu": 0.25, "swap_nvme": 0.0}
    units = [{"name": f"u{i}", "placement": {"param": "cpu"}, "activations": activations} for i in range(2)]
    drawn: list[tuple[Any, Any, str]] = []
    monkeypatch.setattr("matplotlib.axes.Axes.broken_barh", lambda _, x, y, color: drawn.append((x, y, color)))
    report._map(units)
    colour = report._DECIDED
    heights = [(round(y[1], 3), color) for x, y, color in drawn[: len(drawn) // 2] if x == [(0, 2)]]
    assert heights == [
        (0.8, colour["cpu"]), (0.4, colour["keep"]), (0.2, colour["swap_cpu"]), (0.2, colour["recompute"]),
    ]  # fmt: skip


def test_a_run_that_failed_says_so(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    memory = json.loads((broken / "memory.json").read_text())
    (broken / "memory.json").write_text(json.dumps(memory | {"failure": "OutOfMemory: <none> left"}))
    report.build(broken)
    text = (broken / "report.html").read_text()
    assert "OutOfMemory: &lt;none&gt; left" in text and "took all its steps, and failed after them" in text


def test_doctor_orders_advice_by_effect() -> None:
    from offload import doctor

    store = {"filesystem": "ext4", "direct_io": False, "free_bytes": 1, "total_bytes": 100,
             "read_bytes_per_second": 4e8, "write_bytes_per_second": 2e8}  # fmt: skip
    found = {
        "gpu": [], "ram": {"auto_budget_bytes": 2**27}, "numa": [{"cxl_like": True}],
        "stores": [{"path": "/slow", **store}, {"path": "/gone", "error": "not writable"}],
    }  # fmt: skip
    told = doctor._advice(found)
    order = ["/gone cannot be used", "memory.cpu: auto", "No CUDA", "/slow moves", "no O_DIRECT", "99% full", "CXL"]
    places = [next(i for i, line in enumerate(told) if words in line) for words in order]
    assert places[2:] == sorted(places[2:]) and max(places[:2]) < places[2], told
    assert "10.0x" in told[places[3]]
