"""Fault injection: a backend around another one that makes chosen requests fail the way devices do.

Rules are a string, several separated by ";", each `kind:action[:option...]`:

    kind     "read", "write" or "sync"
    action   an errno name ("EIO", "ENOSPC", ...): the request fails with it before it moves anything
             "short"          every system call of the request moves only a part
             "flip"           (read) one bit of the bytes that were read is wrong
             "kill"           the process gets SIGKILL
             "delay=SECONDS"  the request takes that much longer
    option   "after=N"  the first N requests of the kind are spared (default 0)
             "times=N"  only the next N requests are hit (default: all that follow)

For example "write:ENOSPC:after=100" or "read:delay=0.01;read:flip:after=3:times=1". A store request is split into
backend requests of at most 8 MiB; those are what is counted. A commit of a store makes one sync per data file, then
one for writing the new manifest and one for putting it in place.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .backend import Backend
from .buffers import PAGE
from .errors import StoreError
from .request import Transfer

ENVIRONMENT = "OFFLOAD_FAULTS"
"""Environment variable whose rules Store.create and Store.open apply to their backend."""


@dataclass
class Rule:
    """One rule; `seen` counts the requests of its kind."""

    kind: str
    action: str
    seconds: float = 0.0
    after: int = 0
    times: int | None = None
    seen: int = field(default=0, compare=False)

    def hits(self) -> bool:
        self.seen += 1
        past = self.seen - self.after
        return past > 0 and (self.times is None or past <= self.times)


def parse_rules(text: str) -> list[Rule]:
    """The rules in `text`. Raises StoreError that names the rule which cannot be understood."""
    return [_parse_rule(part.strip()) for part in text.split(";") if part.strip()]


def _parse_rule(text: str) -> Rule:
    kind, _, rest = text.partition(":")
    action, *options = rest.split(":")
    action, _, value = action.partition("=")
    try:
        if kind not in ("read", "write", "sync"):
            raise ValueError(f"'{kind}' is not read, write or sync")
        if action == "delay":
            rule = Rule(kind, action, seconds=float(value))
        elif value or (action not in ("short", "flip", "kill") and not isinstance(getattr(errno, action, None), int)):
            raise ValueError(f"unknown action '{action}'")
        elif (action == "flip" and kind != "read") or (action == "short" and kind == "sync"):
            raise ValueError(f"'{action}' makes no sense for a {kind}")
        else:
            rule = Rule(kind, action)
        for option in options:
            name, _, number = option.partition("=")
            if name not in ("after", "times"):
                raise ValueError(f"unknown option '{option}'")
            setattr(rule, name, int(number))
    except ValueError as error:
        raise StoreError(f"fault rule '{text}': {error}", advice="See offload.io.faults for the syntax.") from error
    return rule


class FaultyBackend(Backend):
    """`inner` with faults. Everything else is the inner backend's."""

    def __init__(self, inner: Backend, rules: str) -> None:
        super().__init__(inner.meter)
        self._inner = inner
        self._rules = parse_rules(rules)
        self._lock = threading.Lock()

    def close(self, timeout: float | None = None) -> bool:
        return self._inner.close(timeout)

    def submit(self, transfer: Transfer) -> None:
        with self._lock:
            hits = [rule for rule in self._rules if rule.kind == transfer.kind and rule.hits()]
        for rule in hits:
            if rule.action == "short":
                transfer.most_per_call = max(PAGE, transfer.nbytes // 3 // PAGE * PAGE)
            elif rule.action == "flip":
                transfer.after = _chain(_flip, transfer.after)
            else:
                transfer.before = _chain(_trouble(rule), transfer.before)
        self._inner.submit(transfer)


_Hook = Callable[[memoryview], None]


def _chain(first: _Hook, then: _Hook | None) -> _Hook:
    def hook(view: memoryview) -> None:
        first(view)
        if then is not None:
            then(view)

    return hook


def _flip(view: memoryview) -> None:
    view[len(view) // 2] ^= 1


def _trouble(rule: Rule) -> _Hook:
    def hook(view: memoryview) -> None:
        if rule.action == "delay":
            time.sleep(rule.seconds)
        elif rule.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            code = getattr(errno, rule.action)
            raise OSError(code, os.strerror(code))

    return hook
