"""Errors a user can act on. The command line prints them without a traceback."""

from collections.abc import Iterable


class EmberError(Exception):
    """Base class of the errors raised on purpose."""


class UnknownNameError(EmberError):
    """A name (concept, model, method, parameter, profile) that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        listing = ", ".join(sorted(known)) or "none"
        super().__init__(f"unknown {kind} {name!r}; known: {listing}." + (f" {hint}" if hint else ""))


class DataError(EmberError):
    """Concept data that breaks its format; the message names file, line and field."""


class DamagedFileError(EmberError):
    """A cache or result file whose content is not what was written."""


class DownloadError(EmberError):
    """Something had to be fetched and could not be."""


class WrongWeightsError(EmberError):
    """An edit met weights other than those it was made for."""


class NothingFoundError(EmberError):
    """A method finds nothing of the concept that it could edit. A batch records that as a result and goes on."""


def require_at_least(config: object, least: float, *names: str) -> None:
    """A ``ValueError`` that names the first of a config's settings below ``least`` (or NaN)."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
