"""Errors a user can act on. Each message says what happened, to what, and what to do; `exit_code` is the command's."""


class OffloadError(Exception):
    """Base of all errors that the command line shows as one message instead of a traceback."""

    exit_code = 1


def described(error: BaseException) -> str:
    """An error in one text: its kind, and its message if it has one."""
    return ": ".join(filter(None, (type(error).__name__, str(error))))


class ConfigError(OffloadError):
    """The configuration is wrong; nothing was written."""

    exit_code = 2


class DoesNotFit(OffloadError):
    """The plan exceeds a budget; the message names each tier, what it needs and what it has."""

    exit_code = 3


class DataError(OffloadError):
    """A data file is missing or damaged; the message names file and line. Found before anything is written."""

    exit_code = 2


class WeightsError(OffloadError):
    """A checkpoint does not match the model; the message names the tensor. Found before anything is written."""

    exit_code = 2
