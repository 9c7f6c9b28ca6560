"""Everything svcdp raises.

::

    SvcdpError
    ├── ConfigError (ValueError)           a setting, flag or argument is wrong
    ├── ManifestError (ValueError)         a manifest is wrong: .file, .line, .field, .object
    ├── ConflictError                      two owners of one address:port/protocol
    ├── CapacityError                      a bound was reached
    ├── NotFoundError (KeyError)           no such service, destination or scheduler
    ├── ClosedError                        used after close()
    ├── SourceError                        a source of objects cannot be read
    ├── StateError                         saved or received connections cannot be read
    └── PlatformError (OSError)            the system refused; .errno is kept
        ├── MissingCapability              needs CAP_NET_ADMIN or CAP_NET_RAW
        ├── FeatureUnavailable             this kernel or host lacks something: says what
        └── RulesError                     a rules tool failed: .argv, .stderr

Nothing is raised per packet: a packet gets a :class:`svcdp.Verdict` and a counted
:class:`svcdp.Reason`. Every message says what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "ConflictError",
    "FeatureUnavailable",
    "ManifestError",
    "MissingCapability",
    "NotFoundError",
    "PlatformError",
    "RulesError",
    "SourceError",
    "StateError",
    "SvcdpError",
]


class SvcdpError(Exception):
    """Base of all errors that svcdp raises."""


class ConfigError(SvcdpError, ValueError):
    """A setting, flag or argument is wrong."""


class ManifestError(SvcdpError, ValueError):
    """A manifest is wrong. Attributes that are not known are empty or 0."""

    def __init__(
        self, message: str, *, file: str = "", line: int = 0, field: str = "", object: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.line = line
        self.field = field
        self.object = object

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return ": ".join(part for part in (place, self.object, self.field, self.message) if part)


class ConflictError(SvcdpError):
    """Two owners of one thing, for example of one address, port and protocol."""


class CapacityError(SvcdpError):
    """A bound was reached."""


class NotFoundError(SvcdpError, KeyError):
    """No such service, destination or scheduler."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class ClosedError(SvcdpError):
    """Used after it was closed."""


class SourceError(SvcdpError):
    """A source of Kubernetes objects cannot be read."""


class StateError(SvcdpError):
    """Saved connections, or those that a peer tells of, cannot be read."""


class PlatformError(SvcdpError, OSError):
    """The operating system refused something; ``errno`` is kept."""

    def __str__(self) -> str:
        # The text says it in words; OSError would put "[Errno 95]" before it.
        return self.strerror or Exception.__str__(self)


class MissingCapability(PlatformError):
    """A capability such as CAP_NET_ADMIN is missing."""


class FeatureUnavailable(PlatformError):
    """This kernel or host lacks something that was asked for."""


class RulesError(PlatformError):
    """A rules tool failed. Nothing of the failed transaction is in force."""

    def __init__(self, message: str, *, argv: Sequence[str] = (), stderr: str = "") -> None:
        super().__init__(message)
        self.argv = tuple(argv)
        self.stderr = stderr
