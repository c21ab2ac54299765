"""The keys of the config as the schema has them: what a key takes, its default and its meaning, in words."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from offload.config import Config
from offload.config_values import Accepted, Section


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a key holds, one or a list of them; None if it holds a value."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Section) else None
    return next((s for s in map(section_in, get_args(annotation)) if s), None)


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key below `section` with its field, dotted, sections before what is in them; lists end with `[]`."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := section_in(field.annotation):
            several = any(get_origin(part) is list for part in get_args(field.annotation))
            yield from all_keys(inner, f"{prefix}{name}{'[]' * several}.")


def accepted(field: FieldInfo) -> str:
    """What a key takes, in Markdown."""
    return _accepted(field.annotation, field.metadata)


def default_text(field: FieldInfo) -> str:
    """A key's default as YAML in one line."""
    value = field.get_default(call_default_factory=True)
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return re.sub(r"e([+-])0(\d)", r"e\1\2", text.removesuffix("...\n").strip())


def gist(field: FieldInfo) -> str:
    """The first sentence of a key's meaning, as plain text."""
    first = (field.description or "").split(". ")[0]
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", first).replace("`", "")


def words(field: FieldInfo) -> list[str]:
    """The words that a key takes, if it takes no others."""
    return [str(word) for word in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []


def _accepted(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if told := [entry.text for entry in metadata if isinstance(entry, Accepted)]:
        return str(told[-1])
    if origin is Annotated:
        return _accepted(parts[0], [*_constraints(parts[1:]), *metadata])
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in parts)
    if origin in (Union, types.UnionType):
        kinds = [part for part in parts if part is not type(None)]
        texts = [_accepted(kind, metadata) for kind in kinds]
        # `0 or more, a list of them`: not the same range again
        texts[1:] = ["a list of them" if text == f"a list of {texts[0]}" else text for text in texts[1:]]
        return ", ".join(texts) + (", or `null`" if len(kinds) < len(parts) else "")
    if origin is list:
        return "a list of the keys below" if section_in(parts[0]) else f"a list of {_accepted(parts[0], ())}"
    if origin is tuple:
        return f"a list of {len(parts)}, each {_accepted(parts[0], ())}"
    if origin is dict:
        return "a mapping"
    if section_in(annotation):
        return "the keys below"
    if annotation is bool:
        return "`true`, `false`"
    return _range(metadata) if annotation in (int, float) else "text"


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    """Metadata of a type with that of a `Field` in it laid open."""
    return [inner for entry in metadata for inner in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]


def _range(metadata: Sequence[Any]) -> str:
    bounds = {type(entry): entry for entry in metadata}
    above, least, below = (bounds.get(kind) for kind in (annotated_types.Gt, annotated_types.Ge, annotated_types.Lt))
    low = f"above {above.gt}" if above else f"{least.ge} or more" if least else "a number"
    if not below:
        return low
    return f"{f'from {least.ge}' if least else low}, below {'2^63' if below.lt == 2**63 else below.lt}"
