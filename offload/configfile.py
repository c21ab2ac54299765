"""Reading a config: files, `--set` overrides, and errors that name the key, the value and what is accepted."""

from __future__ import annotations

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from offload.config import Config
from offload.config_keys import all_keys, gist, section_in
from offload.config_values import Section
from offload.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML with two traps removed: `1e-5` is a number (YAML 1.1 says text), and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value!r} stands twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()) -> Config:
    """See `Config.load`."""
    if isinstance(source, Config):
        name, raw = "config", source.dump()
    elif isinstance(source, Mapping):
        name, raw = "config", copy.deepcopy(dict(source))
    else:
        name, raw = str(source), _read(Path(source).expanduser())
    for override in overrides:
        _apply(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(item)]
        if len(lines) == 1:
            raise ConfigError(f"{name}: {lines[0]}") from None
        raise ConfigError(f"{name}: {len(lines)} problems\n  " + "\n  ".join(lines)) from None


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        run = path / "config.yaml"
        hint = f"; for the run in it give {run}" if run.is_file() else "; give the config file itself"
        raise ConfigError(f"{path} is a directory{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; `offload init --out {path}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    try:
        if path.suffix == ".toml":
            raw = tomllib.loads(text)
        elif path.suffix == ".json":
            raw = json.loads(text)
        else:
            raw = _parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except tomllib.TOMLDecodeError as error:  # its message ends with the line and column
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: got {_short(raw)}; a config is a mapping with the keys {_keys(Config)}")
    return raw


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in place; the value is YAML, list elements are numbered from 0."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: accepted: key.sub=value, such as train.optimizer.lr=1e-5")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(
            f"--set {override}: the value {text!r} is not valid YAML: {why}; quote text with special characters"
        ) from None
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(parts[:depth])
                raise ConfigError(f"--set {override}: {where} is a list of {len(node)}; got element {part!r}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise ConfigError(f"--set {override}: {'.'.join(parts[:depth])} holds {_short(node)}, which has no keys")
        if last:
            node[index] = value
        node = node[index]


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "dict_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of {le} or less",
}


def _explain(item: Any) -> list[str]:
    """One pydantic error as lines `key: got value; accepted: ...`."""
    loc, kind, got, context = item["loc"], item["type"], item["input"], item.get("ctx", {})
    key = ".".join(str(part) for part in loc)
    section = _section(loc[:-1])
    if kind == "combination":
        return str(context["text"]).split("\n")
    if kind == "extra_forbidden":
        fields = list(section.model_fields) if section else []
        return [f"{key}: unknown key (got {_short(got)}){_nearest(str(loc[-1]), fields)}; accepted: {_keys(section)}"]
    if kind == "missing":
        field = section.model_fields.get(str(loc[-1])) if section else None
        meaning = f" ({gist(field)})" if field and field.description else ""
        return [f"{key}: missing; give a value{meaning}"]
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return [f"{key}: got {_short(got)}; accepted: {context['expected']}{_nearest(str(got), options)}"]
    if kind in ("model_type", "model_attributes_type"):
        return [f"{key}: got {_short(got)}; accepted: a mapping with the keys {_keys(_section(loc))}"]
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return [f"{key}: got {_short(got)}; accepted: {bound} element(s)"]
    wanted = _WANTED.get(kind)
    if wanted:
        return [f"{key}: got {_short(got)}; accepted: {wanted.format(**context)}"]
    return [f"{key}: got {_short(got)}; {item['msg']}"]


def _section(loc: tuple[int | str, ...]) -> type[Section] | None:
    """The schema class at a location, or None where the schema is free (model.architecture)."""
    found: type[Section] | None = Config
    for part in loc:
        if isinstance(part, int) or found is None:
            continue
        field = found.model_fields.get(part)
        found = section_in(field.annotation) if field else None
    return found


def _keys(section: type[Section] | None) -> str:
    return ", ".join(section.model_fields) if section else "-"


def _nearest(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    elsewhere = [key for key, _ in all_keys() if key.rpartition(".")[2] == word]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
