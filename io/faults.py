"""Fault injection: a backend around another one that makes chosen requests fail the way devices do.

Rules are a string, several separated by ";", each `kind:action[:option...]`:

    kind     "read", "write" or "sync"
    action   an errno name ("EIO", "ENOSPC", ...): the request fails with it before it moves anything
             "short"          every system call of the request moves only a part
             "flip"           (read) one bit of the bytes that were read is wrong
             "kill"           the process gets SIGKILL
             "delay=SECONDS"  the request takes that much longer
             "rate=BYTES"     all requests of the kind together move at most that many bytes per second
             "hang"           the request never completes; only closing the backend ends it
    option   "after=N"  the first N requests of the kind are spared (default 0)
             "times=N"  only the next N requests are hit (default: all that follow)

With "delay" and "rate" a fast disk behaves like a slow one, and always the same: a request ends when that device would
have been done with it and everything begun before it, "read:rate=5e8;write:rate=3e8;read:delay=0.0001" say. Both hold
requests of their kind only; what really takes longer than that is not made faster.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

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
    value: float = 0.0
    after: int = 0
    times: int | None = None
    seen: int = field(default=0, compare=False)
    busy_until: float = field(default=0.0, compare=False)

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
        if action in ("delay", "rate"):
            rule = Rule(kind, action, value=float(value))
            if rule.value < 0 or (action == "rate" and (rule.value == 0 or kind == "sync")):
                raise ValueError(f"'{action}={value}' makes no sense for a {kind}")
        elif value or not (
            action in ("short", "flip", "kill", "hang") or isinstance(getattr(errno, action, None), int)
        ):
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
        self._hung: list[Transfer] | None = []

    @property
    def name(self) -> str:  # type: ignore[override]
        return self._inner.name

    def register(self, buffers: Sequence[Tensor]) -> bool:
        return self._inner.register(buffers)

    def close(self, timeout: float | None = None) -> bool:
        closed = self._inner.close(timeout)
        with self._lock:
            hung, self._hung = self._hung or [], None
        for transfer in hung:
            transfer.finish(transfer.timed_out("still running when the backend was closed: the device hangs"))
        return closed and not hung

    def submit(self, transfer: Transfer) -> None:
        with self._lock:
            hits = [rule for rule in self._rules if rule.kind == transfer.kind and rule.hits()]
            if any(rule.action == "hang" for rule in hits) and self._hung is not None:
                transfer.meter = self.meter
                transfer.begin = transfer.progress = time.perf_counter()
                self._hung.append(transfer)
                return
        for rule in hits:
            if rule.action == "short":
                transfer.most_per_call = max(PAGE, transfer.nbytes // 3 // PAGE * PAGE)
            elif rule.action == "flip":
                transfer.after = _chain(_flip, transfer.after)
            elif rule.action == "rate":
                self._limit(rule, transfer)
            else:
                transfer.before = _chain(_trouble(rule), transfer.before)
        self._inner.submit(transfer)

    def _limit(self, rule: Rule, transfer: Transfer) -> None:
        """Hold `transfer` until a device of that rate, which serves one request at a time, were done with it."""
        end = 0.0

        def begin(view: memoryview) -> None:
            nonlocal end
            with self._lock:
                end = rule.busy_until = max(rule.busy_until, time.perf_counter()) + len(view) / rule.value

        def hold(view: memoryview) -> None:
            time.sleep(max(0.0, end - time.perf_counter()))
            transfer.progress = self.meter.progress = time.perf_counter()

        transfer.before = _chain(begin, transfer.before)
        transfer.after = _chain(hold, transfer.after)


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
            time.sleep(rule.value)
        elif rule.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            code = getattr(errno, rule.action)
            raise OSError(code, os.strerror(code))

    return hook
