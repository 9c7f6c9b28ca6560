"""Changes of objects in, changed specs out, at a cost that follows the change."""

from __future__ import annotations

from collections.abc import Iterable

from svcdp.errors import ManifestError, SvcdpError
from svcdp.kube.claims import Claims, Key
from svcdp.kube.context import NodeContext
from svcdp.kube.model import ServiceRef
from svcdp.kube.resolve import resolve_service
from svcdp.kube.state import Change, State
from svcdp.types import ServiceSpec

__all__ = ["Tracker"]


class Tracker:
    """What :func:`svcdp.kube.resolve` says, kept up to date.

    Only Services that a change touches are resolved again. Not safe for several threads.
    """

    def __init__(self, node: NodeContext) -> None:
        self.node = node
        self.state = State()
        self.claims = Claims()
        self._problems: dict[ServiceRef, list[ManifestError]] = {}

    def apply(self, changes: Iterable[tuple[int, str, Change]]) -> set[Key]:
        """Take changes in, each with the rank and name of its source.

        Returns the keys whose spec may be different now: :meth:`spec` knows.
        """
        touched: set[ServiceRef] = set()
        for rank, source, change in changes:
            touched |= self.state.apply(rank, source, change)
        keys: set[Key] = set()
        for ref in touched:
            keys |= self._resolve(ref)
        return keys

    def spec(self, key: Key) -> ServiceSpec | None:
        """The spec in force for a key; None: nobody's."""
        return self.claims.held(key)

    def problems(self) -> list[SvcdpError]:
        """What is wrong with the objects now."""
        found: list[SvcdpError] = [*self.state.conflicts()]
        for ref in sorted(self._problems):
            found += self._problems[ref]
        return [*found, *self.claims.conflicts()]

    def _resolve(self, ref: ServiceRef) -> set[Key]:
        service = self.state.services.get(ref)
        self._problems.pop(ref, None)
        if service is None:
            return self.claims.replace(ref, ())
        resolved = resolve_service(service, self.state.slices(ref), self.node)
        if resolved.problems:
            self._problems[ref] = resolved.problems
        return self.claims.replace(ref, resolved.claims)
