"""Scheduler names: those of the core, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from math import isqrt
from typing import TypeVar

from svcdp.abc import Scheduler
from svcdp.errors import ConfigError, NotFoundError

__all__ = [
    "BUILTIN",
    "FLAGS",
    "flag_bits",
    "is_table_size",
    "names",
    "new_scheduler",
    "register_scheduler",
]

#: Schedulers of the core, by the number that it knows them by (sched.pxd).
BUILTIN = {
    "rr": 0,
    "wrr": 1,
    "random": 2,
    "lc": 4,
    "wlc": 5,
    "sed": 6,
    "nq": 7,
    "fo": 8,
    "ovf": 9,
    "dh": 10,
    "sh": 11,
    "mh": 12,
    "lblc": 13,
    "lblcr": 14,
    "twos": 15,
    "none": 16,
}

#: The core asks Python for each new connection.
PYTHON = 3

#: The flags that a scheduler knows, and their bits (SCHEDULER_FALLBACK and so on).
FLAGS: dict[str, dict[str, int]] = {
    "sh": {"sh-fallback": 1, "sh-port": 2},
    "mh": {"mh-fallback": 1, "mh-port": 2},
}

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


def flag_bits(flags: Iterable[str]) -> int:
    """The flags of a service as the core takes them. They are known to be valid."""
    bits = {name: bit for known in FLAGS.values() for name, bit in known.items()}
    return sum(bits[flag] for flag in set(flags))


@lru_cache
def is_table_size(size: int) -> bool:
    """Whether mh can have a table of this size (from 251 to 655373): it must be prime."""
    return all(size % divisor for divisor in range(2, isqrt(size) + 1))


def names() -> list[str]:
    """All scheduler names that a service can have now."""
    return sorted([*BUILTIN, *_registered])


def new_scheduler(name: str) -> Scheduler:
    """An instance of a registered scheduler. NotFoundError."""
    try:
        return _registered[name]()
    except KeyError:
        raise NotFoundError(f"no scheduler {name!r}; there are {', '.join(names())}") from None
