"""The config file: one run, from all its sections.

The schema is the reference of what a user may write: the sections with every key, its type, default and meaning are in
`config_sections.py`, which combinations exist in `config_rules.py`. Loading from files, `--set` and the wording of
errors are in `configfile.py`; `docs/config.md` is printed from the schema by `config_reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from offload.config_rules import impossible
from offload.config_sections import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    NvmePath,
    PlannerConfig,
    TrainConfig,
    ZoConfig,
)
from offload.config_values import PathText, Section, absolute, is_local


class Config(Section):
    """One run. `model` and `data` may be absent when `offload.wrap` is given a model and batches."""

    model: ModelConfig | None = None
    data: DataConfig | None = None
    train: TrainConfig = TrainConfig()
    zo: ZoConfig | None = Field(default=None, description="only with train.method zo")
    memory: MemoryConfig = MemoryConfig()
    planner: PlannerConfig = PlannerConfig()
    output: PathText = Field(
        default="runs/my-run", description="the run directory; must be new or empty unless `--resume` is given"
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, raw: Any) -> Any:
        """`train:` with nothing under it is YAML for null, and means the defaults."""
        if not isinstance(raw, Mapping):
            return raw
        return {k: v for k, v in raw.items() if v is not None or k not in ("train", "memory", "planner")}

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if problems := list(impossible(self)):
            raise PydanticCustomError("combination", "{text}", {"text": "\n".join(problems)})
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()) -> Config:
        """The config in a .yaml, .toml or .json file, a mapping or another config, with `key.sub=value` overrides.

        Raises ConfigError that names the key, what it got, what it accepts and the nearest valid key.
        """
        from offload import configfile

        return configfile.load(source, overrides)

    def dump(self) -> dict[str, Any]:
        """Plain data that `Config.load` reads back to an equal config; sizes as text where exact."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the config as YAML, atomically."""
        import yaml

        from offload.rundir import write_atomically

        write_atomically(path, yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True))

    def resolved(self) -> Config:
        """The same run described from any directory: local paths absolute, `memory.nvme` left null if it is."""
        raw = self.dump()
        raw["output"] = absolute(self.output)
        if self.model and self.model.path and is_local(self.model.path):
            raw["model"]["path"] = absolute(self.model.path)
        if self.data:
            for key in ("path", "eval_path", "tokenizer"):
                value = raw["data"][key]
                if value and not (key == "tokenizer" and value == "bytes") and is_local(value):
                    raw["data"][key] = absolute(value)
        for entry in raw["memory"]["nvme"] or []:
            entry["path"] = absolute(entry["path"])
        return Config.model_validate(raw)

    def store_paths(self) -> list[NvmePath]:
        """Where the store lies: `memory.nvme` with absolute paths, or `<output>/store` of size auto."""
        if self.memory.nvme is None:
            return [NvmePath(path=absolute(str(Path(self.output) / "store")))]
        return [entry.model_copy(update={"path": absolute(entry.path)}) for entry in self.memory.nvme]

    def with_micro_batch_size(self, rows: int | Literal["auto"]) -> Config:
        """The same run with `train.micro_batch_size` settled, where it is `auto`."""
        if self.train.micro_batch_size != "auto":
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch_size": rows})})
