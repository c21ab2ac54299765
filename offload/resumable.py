"""Which settings may differ when a run goes on: those that cannot change its numbers."""

from __future__ import annotations

from typing import Any

from offload.config import Config
from offload.errors import ConfigError

# Keys, with everything below them, that say where and how long, not what is computed.
MAY_CHANGE = (
    "output", "memory", "planner", "train.steps", "train.epochs", "train.commit_every", "train.eval_every",
    "train.report_to", "data.eval_path",
)  # fmt: skip


def check_resumable(saved: Config, new: Config) -> None:
    """Raise ConfigError naming every key of `new` that would change the numbers of the run that `saved` began.

    The store stays where it is, so `memory.nvme` may change sizes but no paths.
    """
    old, wanted = _flat(saved.resolved().dump()), _flat(new.resolved().dump())
    lines = [
        f"{key}: the run has {old.get(key)!r}, the config now says {wanted.get(key)!r}"
        for key in sorted(old.keys() | wanted.keys())
        if old.get(key) != wanted.get(key) and not key.startswith(tuple(f"{k}." for k in MAY_CHANGE))
        and key not in MAY_CHANGE
    ]  # fmt: skip
    before, now = ([entry.path for entry in cfg.memory.nvme or []] for cfg in (saved.resolved(), new.resolved()))
    if before != now:
        lines.append(f"memory.nvme: the store of the run is at {before or '<output>/store'}, the config now says {now}")
    if lines:
        raise ConfigError(
            "--resume goes on with the same numbers, so these cannot change:\n  "
            + "\n  ".join(lines)
            + "\nrestore them, or start a new run with --set output=..."
        )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; a section that is null has no keys."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}".lstrip(".")).items()}
    return {key: value}
