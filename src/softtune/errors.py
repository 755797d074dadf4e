"""Every error that softtune raises for its users, as one tree.

    SofttuneError(ValueError)
    ├── ConfigError             a field of a config or recipe is unknown, of the wrong type or out of range
    │   └── MissingPeftTypeError    a saved config does not name its method
    ├── UnsupportedModelError   the base model does not support this method; the message names those that it does
    ├── AdapterError            an adapter's name is not loaded, or is loaded already
    │   ├── AdapterMismatchError    the adapter was trained on another base model
    │   └── CheckpointError         a folder or file is missing, truncated, or in an unsafe format
    ├── DataError               a data file, column, label or template does not fit
    ├── TrainingError           training had to stop; the message says what was kept
    ├── MissingExtraError       a package of one of softtune's extras is not installed; the message names the extra
    └── RequestError            a server cannot do what a request asks for
        ├── TooLongError            its prompt, with the tokens to generate, is longer than the model takes
        ├── FullError               too many other requests are waiting
        └── ClosedError             the server is shutting down

Each message is one line: what is wrong, then what to do. All derive from ``ValueError``, as PEFT's do.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AdapterMismatchError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "DataError",
    "FullError",
    "MissingExtraError",
    "MissingPeftTypeError",
    "RequestError",
    "SofttuneError",
    "TooLongError",
    "TrainingError",
    "UnsupportedModelError",
]


class SofttuneError(ValueError):
    """Base of every error that softtune raises for its users.

    Args:
        what: what is wrong.
        remedy: what to do about it; None where ``what`` says it.
    """

    def __init__(self, what: str, remedy: str | None = None) -> None:
        super().__init__(what if remedy is None else f"{what}: {remedy}")
        self.what = what
        self.remedy = remedy

    def at(self, place: str) -> SofttuneError:
        """The same error, said to be at a place: a file, a row, a run."""
        return type(self)(f"{place}: {self.what}", self.remedy)


class ConfigError(SofttuneError):
    """A field of a config or recipe is unknown, of the wrong type or out of range."""


class MissingPeftTypeError(ConfigError, TypeError):
    """A saved config does not name its method. It is a ``TypeError`` too, as PEFT's is."""


class UnsupportedModelError(SofttuneError):
    """The base model does not support this method."""


class AdapterError(SofttuneError):
    """An adapter's name is not loaded, or is loaded already."""


class AdapterMismatchError(AdapterError):
    """The adapter was trained on another base model."""


class CheckpointError(AdapterError):
    """An adapter's folder or file is missing, truncated, or in an unsafe format."""


class DataError(SofttuneError):
    """A data file, column, label or template does not fit."""


class TrainingError(SofttuneError):
    """Training had to stop; the message says what was kept."""


class MissingExtraError(SofttuneError, ImportError):
    """A package of one of softtune's extras is not installed; the message names the extra."""


class RequestError(SofttuneError):
    """A server cannot do what a request asks for."""


class TooLongError(RequestError):
    """A request's prompt, with the tokens to generate, is longer than the model takes."""


class FullError(RequestError):
    """Too many other requests are waiting."""


class ClosedError(RequestError):
    """The server is shutting down."""
