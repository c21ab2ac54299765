"""The config schema: what it accepts, and that every mistake names its key, its value and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from offload import preflight
from offload.config import Config
from offload.config_values import format_size, parse_size
from offload.errors import ConfigError
from offload.resumable import check_resumable

MODEL = {"architecture": {"model_type": "llama", "hidden_size": 64}}
FULL: dict[str, Any] = {
    "model": {"path": "./my-model", "dtype": "bfloat16"},
    "data": {
        "path": "data.jsonl", "format": "alpaca", "tokenizer": None, "sequence_length": 1024, "packing": True,
        "padding": True, "eval_fraction": 0.0,
    },
    "train": {
        "method": "full", "steps": 1000, "micro_batch_size": 1, "global_batch_size": 16,
        "optimizer": {
            "name": "adamw", "lr": 1.0e-5, "betas": [0.9, 0.999], "eps": 1.0e-8, "weight_decay": 0.0, "state": "fp32",
        },
        "schedule": {"name": "cosine", "warmup_steps": 50}, "max_grad_norm": 1.0, "commit_every": "auto",
        "eval_every": None, "report_to": [], "seed": 0,
    },
    "memory": {
        "device": "auto", "gpu": "auto", "cpu": "48GiB", "cxl": None,
        "nvme": [{"path": "/mnt/nvme0/offload", "size": "500GiB"}], "backend": "auto",
    },
    "planner": {"solver": "auto", "time_limit": 10},
    "output": "runs/my-run",
}  # fmt: skip


def message(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(source, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_every_documented_key_with_its_default() -> None:
    cfg = Config.load(FULL)
    assert cfg.memory.cpu == 48 * 2**30
    assert cfg.memory.nvme is not None and cfg.memory.nvme[0].size == 500 * 2**30
    defaults = Config.load({"model": {"path": "./my-model"}, "data": {"path": "data.jsonl"}})
    for section in ("train", "planner", "output", "data"):
        assert getattr(defaults, section) == getattr(cfg, section)
    assert (defaults.memory.cpu, defaults.memory.gpu, defaults.memory.nvme) == ("auto", "auto", None)
    assert defaults.store_paths()[0].path == str(Path.cwd() / "runs/my-run/store")


def test_empty_sections_mean_defaults() -> None:
    assert Config.load({"train": None, "memory": None}) == Config.load({})


def test_yaml_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {steps: 5, optimizer: {lr: 1e-5}}\nmemory: {cpu: 2GiB}\n")
    (tmp_path / "c.toml").write_text('[train]\nsteps = 5\n[train.optimizer]\nlr = 1e-5\n[memory]\ncpu = "2GiB"\n')
    (tmp_path / "c.json").write_text('{"train": {"steps": 5, "optimizer": {"lr": 1e-5}}, "memory": {"cpu": "2GiB"}}')
    loaded = [Config.load(tmp_path / f"c.{suffix}") for suffix in ("yaml", "toml", "json")]
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0].train.optimizer.lr == 1e-5


def test_a_dump_loads_again_and_a_resolved_config_works_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    cfg = Config.load(FULL, ["train.epochs=2", "train.steps=null"])
    assert Config.load(cfg.dump()) == cfg
    resolved = cfg.resolved()
    resolved.write(tmp_path / "config.yaml")
    monkeypatch.chdir("/")
    again = Config.load(tmp_path / "config.yaml")
    assert again == resolved == again.resolved()
    assert again.output == str(tmp_path / "runs/my-run")
    assert again.model and again.model.path == str(tmp_path / "my-model")
    assert again.data and again.data.path == str(tmp_path / "data.jsonl")


def test_a_hub_id_is_not_made_a_path() -> None:
    cfg = Config.load({"model": {"path": "org/some-model"}, "data": {"path": "org/some-data"}}).resolved()
    assert cfg.model and cfg.model.path == "org/some-model"
    assert cfg.data and cfg.data.path == "org/some-data"


def test_epochs_replace_the_default_steps() -> None:
    cfg = Config.load({"data": {"path": "x.jsonl"}, "train": {"epochs": 3}})
    assert (cfg.train.steps, cfg.train.epochs) == (None, 3)


def test_a_txt_path_is_text() -> None:
    cfg = Config.load({"data": {"path": "book.txt"}})
    assert cfg.data and cfg.data.format == "text"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("48GiB", 48 << 30), ("1.5 GB", 1_500_000_000), ("500gb", 5 * 10**11), ("4096", 4096), (7, 7), ("64KiB", 65536)],
)
def test_sizes(text: Any, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@given(st.integers(1, 2**50))
def test_a_formatted_size_parses_to_the_same_bytes(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


@pytest.mark.parametrize("size", ["48 potatoes", "GiB", "-1GiB", 0, "0", "", "48G", True, 1.5, [], {}])
def test_wrong_sizes_say_what_is_accepted(size: Any) -> None:
    text = message({"memory": {"cpu": size}})
    assert "memory.cpu" in text and repr(size) in text and "48GiB" in text and '"auto"' in text


def test_unknown_keys_name_the_nearest() -> None:
    text = message({"train": {"stpes": 5}})
    assert "train.stpes: unknown key (got 5)" in text and "did you mean 'steps'?" in text and "micro_batch_size" in text
    assert "'train.optimizer.lr'" in message({"train": {"lr": 1e-5}})
    assert "did you mean 'path'?" in message({"memory": {"nvme": [{"pth": "/x", "path": "/y"}]}})
    assert "did you mean 'train'?" in message({"trian": {}})


@pytest.mark.parametrize(
    ("override", "key", "accepted"),
    [
        ("train.steps=many", "train.steps: got 'many'", "whole number"),
        ("train.steps=true", "train.steps: got True", "number"),
        ("train.steps=-1", "train.steps: got -1", "0 or more"),
        ("train.micro_batch_size=0", "train.micro_batch_size: got 0", "1 or more"),
        ("train.schedule.name=cosin", "train.schedule.name: got 'cosin'", "'cosine', 'linear' or 'constant'"),
        ("train.optimizer.name=sgd", "train.optimizer.name: got 'sgd'", "'adamw'"),
        ("train.optimizer.state=int8", "train.optimizer.state: got 'int8'", "'fp32'"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas", "missing"),
        ("train.optimizer.betas=[0.9, 1.0]", "train.optimizer.betas.1: got 1.0", "below 1"),
        ("train.optimizer.lr=.nan", "train.optimizer.lr: got nan", "finite"),
        ("train.commit_every=0", "train.commit_every: got 0", '"auto"'),
        ("train.max_grad_norm=0", "train.max_grad_norm: got 0", "above 0"),
        ("data.packing=maybe", "data.packing: got 'maybe'", "true or false"),
        ("data.eval_fraction=1", "data.eval_fraction: got 1", "below 1"),
        ("memory.nvme=/mnt", "memory.nvme: got '/mnt'", "a list"),
        ("memory.nvme=[]", "memory.nvme: got []", "1 element"),
        ("model=llama", "model: got 'llama'", "path, architecture"),
        ("output=null", "output: got None", "text"),
        ("train.report_to=[mlflow]", "train.report_to.0: got 'mlflow'", "'tensorboard' or 'wandb'"),
        # combinations
        ("train.epochs=3", "train.epochs: got 3 together with train.steps 1000", "keep one"),
        ("train.steps=null", "train.steps: got null without train.epochs", "give one"),
        ("train.micro_batch_size=3", "train.global_batch_size: got 16", "18"),
        ("train.eval_every=5", "train.eval_every: got 5", "data.eval_path"),
        ("model.dtype=float16", "model.dtype: got 'float16'", "'bfloat16' or 'float32'"),
        ("zo.samples=2", "zo: given with train.method 'full'", "remove it"),
        ("memory.backend=uring", "memory.backend: got 'uring'", "'io_uring'"),
        ("memory.cxl={node: 2}", "memory.cxl.size: missing", "give a value"),
        ("memory.cxl={node: 2, size: 1GiB, emulate: true, bandwidth: 1GiB}", "memory.cxl.emulate: given", "keep one"),
        ("memory.cxl={size: 64GiB, emulate: true}", "memory.cxl.bandwidth: belongs to", "needs it"),
        ("memory.cxl={size: 64GiB, bandwidth: 20GiB}", "memory.cxl.bandwidth: belongs to", "a real node"),
        ("model.architecture.model_type=llama", "model.architecture: given together with model.path", "keep"),
        ("data.path=x.txt", "data.format: got 'alpaca'", "'text'"),
    ],
)  # fmt: skip
def test_mistakes(override: str, key: str, accepted: str) -> None:
    text = message(FULL, override)
    assert key in text and accepted in text
    assert "\n" not in text  # one mistake, one line


def test_several_mistakes_are_told_at_once() -> None:
    text = message({"train": {"stpes": 1, "seed": "x"}, "memory": {"cpu": "lots"}})
    assert "3 problems" in text and text.count("\n") == 3


def test_epochs_need_data() -> None:
    assert "give train.steps" in message({"train": {"epochs": 1}})


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("c.yaml", "train:\n  steps: [1, 2\nmodel: x\n", "line 3"),
        ("c.yaml", "train:\n  steps: 1\n  steps: 2\n", "line 3"),
        ("c.yaml", "a\tb: {\n", "line"),
        ("c.json", '{"train":\n {"steps": }}', "line 2"),
        ("c.toml", "[train]\nsteps = \n", "line 2"),
        ("c.yaml", "- 1\n- 2\n", "a mapping with the keys model, data"),
    ],
)
def test_damaged_files_name_the_line(tmp_path: Path, name: str, text: str, where: str) -> None:
    (tmp_path / name).write_text(text)
    told = message(tmp_path / name)
    assert where in told and name in told


def test_missing_files_and_directories(tmp_path: Path) -> None:
    assert "offload init" in message(tmp_path / "none.yaml")
    assert "is a directory" in message(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {steps: 1}")
    assert str(tmp_path / "config.yaml") in message(tmp_path)


def test_overrides() -> None:
    sets = ["train.optimizer.lr=2e-4", "memory.nvme.0.size=1GiB", "output=runs/other", "train.report_to=[tensorboard]"]
    cfg = Config.load(FULL, sets)
    assert cfg.train.optimizer.lr == 2e-4 and cfg.memory.nvme and cfg.memory.nvme[0].size == 2**30
    assert cfg.output == "runs/other" and cfg.train.report_to == ["tensorboard"]
    cfg = Config.load({"model": MODEL}, ["model.architecture.rope_theta=1e6"])
    assert cfg.model and cfg.model.architecture == {**MODEL["architecture"], "rope_theta": 1e6}
    assert MODEL["architecture"] == {"model_type": "llama", "hidden_size": 64}, "the source is not changed"
    assert "accepted: key.sub=value" in message(FULL, "train.steps")
    assert "not valid YAML" in message(FULL, "train.steps=[1")
    assert "has no keys" in message(FULL, "output.x=1")
    assert "a list of 1" in message(FULL, "memory.nvme.1.size=1GiB")


def test_preflight_tells_what_this_machine_lacks_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "data.txt").write_text("text")
    good = Config.load(
        {
            "model": MODEL,
            "data": {"path": "data.txt", "tokenizer": "bytes"},
            "output": "runs/a",
            "memory": {"nvme": [{"path": "ssd"}]},
        }
    )
    preflight.check(good)
    bad = Config.load(
        good,
        ["data.path=gone.txt", "data.eval_path=./gone-too.txt", "output=file/run", "memory.nvme.0.path=/proc/no"],
    )
    with pytest.raises(ConfigError) as caught:
        preflight.check(bad)
    text = str(caught.value)
    for part in ("data.path: got gone.txt", "data.eval_path: got ./gone-too.txt", "output: got file/run",
                 "memory.nvme.0.path: got /proc/no"):  # fmt: skip
        assert part in text
    with pytest.raises(ConfigError, match=r"data\.tokenizer: missing.*\"bytes\""):  # a fresh model brings none
        preflight.check(Config.load(good, ["data.tokenizer=null"]))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: got \./gone"):
        preflight.check(Config.load(good, ["data.tokenizer=./gone"]))
    for nothing in ({}, {"model": {"dtype": "float32"}}):  # enough when the caller has the model
        cfg = Config.load({**nothing, "output": "runs/a"})
        preflight.check(cfg, model_given=True, data_given=True)
        with pytest.raises(ConfigError, match=r"model.*model\.path"):
            preflight.check(cfg, data_given=True)
    with pytest.raises(ConfigError, match="data: missing"):
        preflight.check(Config.load({"output": "runs/a"}), model_given=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.txt", "file"]


def test_cuda_without_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match=r"memory\.device: got 'cuda'"):
        preflight.check(Config.load({"memory": {"device": "cuda"}}), model_given=True, data_given=True)


def test_trackers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    missing = [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("both trackers are installed")
    cfg = Config.load({"train": {"report_to": missing}})
    with pytest.raises(ConfigError, match=f"pip install {missing[0]}"):
        preflight.check(cfg, model_given=True, data_given=True)


def test_what_may_change_on_resume() -> None:
    saved = Config.load(FULL)
    check_resumable(saved, Config.load(FULL, ["train.steps=5", "memory.cpu=2GiB", "memory.device=cpu", "output=x"]))
    for override, key in (
        ("train.optimizer.lr=1", "train.optimizer.lr: the run has 1e-05, the config now says 1"),
        ("train.seed=1", "train.seed"),
        ("model.dtype=float32", "model.dtype"),
        ("data.sequence_length=8", "data.sequence_length"),
        ("train.micro_batch_size=2", "train.micro_batch_size"),
        ("memory.nvme=null", "memory.nvme: the store of the run is at"),
    ):
        with pytest.raises(ConfigError, match="cannot change") as caught:
            check_resumable(saved, Config.load(FULL, [override]))
        assert key in str(caught.value)


def test_dump_is_plain_data() -> None:
    dump = Config.load(FULL).dump()
    assert json.loads(json.dumps(dump)) == dump == yaml.safe_load(yaml.safe_dump(dump))
