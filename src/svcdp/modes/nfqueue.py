"""The NFQUEUE mode: services in the dataplane, and kernel rules that capture their packets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable

from svcdp.dataplane import Captures, Dataplane
from svcdp.rules import Backend, CapturePlan
from svcdp.types import ForwardMethod, ServiceSpec

__all__ = ["NfqueueMode"]

_NOTHING = Captures()


class _Held:
    """The elements of the kernel's sets."""

    def __init__(self, captures: Captures) -> None:
        self.virtual = set(captures.virtual)
        self.real = set(captures.real)

    def lacks(self, wanted: Captures) -> Captures:
        """What of ``wanted`` is missing. Costs as much as ``wanted`` is large."""
        return Captures(wanted.virtual - self.virtual, wanted.real - self.real)

    def beyond(self, wanted: Captures) -> Captures:
        """What is there and not wanted."""
        return Captures(
            frozenset(self.virtual - wanted.virtual), frozenset(self.real - wanted.real)
        )

    def change(self, added: Captures, removed: Captures) -> None:
        self.virtual |= added.virtual
        self.virtual -= removed.virtual
        self.real |= added.real
        self.real -= removed.real


class NfqueueMode:
    """Makes specs true in a :class:`svcdp.Dataplane`, and has their packets captured.

    ``plan`` says how to capture; what to capture follows the dataplane. Methods may be
    called by any thread.
    """

    def __init__(self, dataplane: Dataplane, rules: Backend, plan: CapturePlan) -> None:
        self._dataplane = dataplane
        self._rules = rules
        self._plan = plan
        self._lock = threading.Lock()
        self._installed = False
        self._held: _Held | None = None  # None: not known, because a change failed
        self._leaving = False  # whether something may be held that is not needed

    def install(self) -> None:
        """Install the rules for what is served now, in one transaction.

        Raises :class:`svcdp.RulesError`; then nothing is captured.
        """
        with self._lock:
            self._installed = True
            self._apply(self._dataplane.captures())

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[tuple[str, int, str]]) -> None:
        """Serve ``specs`` as they are now, and ``removed`` no more.

        Captures grow before the dataplane knows new endpoints: a reply that is not captured
        would reach the client untranslated. They shrink in :meth:`trim`. After an error
        nothing else is served than before, and the same update may come again.
        """
        specs = tuple(specs)
        with self._lock:
            if self._installed:
                self._grow(_captures(specs))
            self._dataplane.update(specs, removed)

    def trim(self) -> None:
        """Stop capturing for what was removed and has no connections left.

        Also mends what a failed change left. Raises :class:`svcdp.RulesError`; the next call
        tries again.
        """
        with self._lock:
            if not (self._installed and self._leaving):
                return
            draining = self._dataplane.draining()
            wanted = self._dataplane.captures()
            if self._held is None:
                self._apply(wanted)
            else:
                self._change(_NOTHING, self._held.beyond(wanted))
            self._leaving = draining != _NOTHING

    def close(self) -> None:
        """Remove what was installed: from here on packets take their way without svcdp."""
        with self._lock:
            if self._installed:
                self._installed = False
                self._rules.remove()

    def _grow(self, wanted: Captures) -> None:
        self._leaving = True
        if self._held is None:
            self._apply(self._dataplane.captures() | wanted)
        else:
            self._change(self._held.lacks(wanted), _NOTHING)

    def _apply(self, wanted: Captures) -> None:
        self._held = None
        plan = dataclasses.replace(self._plan, virtual=wanted.virtual, real=wanted.real)
        self._rules.apply(plan)
        self._held = _Held(wanted)

    def _change(self, added: Captures, removed: Captures) -> None:
        if added == removed == _NOTHING:
            return
        held, self._held = self._held, None
        assert held is not None
        self._rules.update(added, removed)
        held.change(added, removed)
        self._held = held


def _captures(specs: Iterable[ServiceSpec]) -> Captures:
    """What must be captured for these specs alone."""
    specs = tuple(specs)
    return Captures(
        frozenset((spec.protocol, spec.address, spec.port) for spec in specs),
        frozenset(
            (spec.protocol, destination.address, destination.port)
            for spec in specs
            for destination in spec.destinations
            if destination.method == ForwardMethod.MASQ
        ),
    )
