"""What others implement to take part: a scheduler, a source of objects, a proxy mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from svcdp.errors import SvcdpError
from svcdp.types import Destination, Flow, ServiceSpec

if TYPE_CHECKING:
    from svcdp.kube.state import Change

__all__ = ["Mode", "Scheduler", "Sink", "Source"]


class Scheduler(ABC):
    """Picks a destination for each new connection."""

    @abstractmethod
    def pick(self, flow: Flow, destinations: Sequence[Destination]) -> int | None:
        """The index into ``destinations`` for a new connection; None: nobody.

        ``destinations`` are never empty; all have a weight above 0, and none is overloaded or
        ejected. Asked once per connection, with the GIL held: be quick. What it raises is counted,
        and round robin serves the connection.
        """


class Sink(Protocol):
    """Takes resolved services and makes them true. :class:`svcdp.Dataplane` is one."""

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[tuple[str, int, str]]) -> None:
        """Make these services what the specs say and remove others by key; touch no other.

        All or nothing: after an exception the same, or more, comes again. May block.
        """


class Mode(Sink, Protocol):
    """A way to proxy: in the queue dataplane, in user-space sockets, in kernel rules."""

    def close(self) -> None:
        """Stop, and leave nothing behind."""


class Source(Protocol):
    """Where Kubernetes objects come from.

    One may have ``events``, too: what of ``errors`` those who made the objects should see
    (:class:`svcdp.kube.events.Event`).
    """

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def errors(self) -> Sequence[SvcdpError]:
        """What is wrong with the source or its objects now."""
        ...

    def changes(self) -> AsyncIterator[Sequence[Change]]:
        """Batches of changes. The first has everything; an empty one says: see ``errors``.

        An exception before the first batch is final. After a later one it is called again.
        """
        ...
