"""Scheduler names: those of the core, and those that users register."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from svcdp.abc import Scheduler
from svcdp.errors import ConfigError, NotFoundError

__all__ = ["BUILTIN", "names", "new_scheduler", "register_scheduler"]

#: Schedulers of the core, by the number that it knows them by (sched.pxd).
BUILTIN = {"rr": 0, "wrr": 1, "random": 2}

#: The core asks Python for each new connection.
PYTHON = 3

_registered: dict[str, type[Scheduler]] = {}

_S = TypeVar("_S", bound=type[Scheduler])


def register_scheduler(name: str) -> Callable[[_S], _S]:
    """Class decorator: make a :class:`svcdp.abc.Scheduler` available under a name.

    Each service that uses it gets an instance of its own, made without arguments. Registering
    a name again replaces it for services that are configured from then on. ConfigError when
    the name is one of the core's or the class is no Scheduler.
    """
    if not name or name in BUILTIN:
        raise ConfigError(f"scheduler name {name!r} is taken by svcdp; choose another")

    def register(scheduler: _S) -> _S:
        if not (isinstance(scheduler, type) and issubclass(scheduler, Scheduler)):
            raise ConfigError(
                f"scheduler {name!r} must be a class derived from svcdp.abc.Scheduler"
            )
        _registered[name] = scheduler
        return scheduler

    return register


def names() -> list[str]:
    """All scheduler names that a service can have now."""
    return sorted([*BUILTIN, *_registered])


def new_scheduler(name: str) -> Scheduler:
    """An instance of a registered scheduler. NotFoundError."""
    try:
        return _registered[name]()
    except KeyError:
        raise NotFoundError(f"no scheduler {name!r}; there are {', '.join(names())}") from None
