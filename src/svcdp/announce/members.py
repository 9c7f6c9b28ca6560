"""Which nodes may have addresses now: at most one node takes itself for an address's owner.

Each node holds a Lease of its own, and watches those of all. What follows holds without comparing
clocks, and however late a watch is. ``D`` is a Lease's duration; a write counts from when it began.

* A node has addresses only until ``D`` after the newest of its own writes that its *watch* has
  shown: what others wrote before that one it has seen too, since a watch shows writes in the
  order of the API server's versions.
* Another counts as dead when the watch has shown an own write that began ``D`` or more after the
  other's last one was seen: by then that one has no addresses any more.
* Who comes, or was late with a write, waits for ``D`` before it has addresses: by then all who have
  some have seen it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Protocol

from svcdp.kube.leases import (
    Lease,
    LeaseClient,
    LeaseRecord,
    Observation,
    boot_time,
    lease_resource,
)
from svcdp.kube.model import ObjectKey
from svcdp.kube.reflector import ApiError, Reflector, Requests

__all__ = ["LABEL", "FixedMembers", "LeaseMembers", "Members"]

log = logging.getLogger(__name__)

#: What the Leases have, with the value ``true``.
LABEL = "svcdp.io/announces-addresses"
RENEWALS = 4  # within a Lease's duration
RETRY = (0.1, 1.0)  # seconds; as for reflectors


class Members(Protocol):
    """The nodes of which one has each address."""

    @property
    def problem(self) -> str:
        """Why this node can have none, or ""."""
        ...

    def alive(self) -> Set[str]:
        """Those that may have addresses now, this node included; none: it must have none."""
        ...

    async def run(self) -> None:
        """Be one of them, until cancelled."""
        ...

    async def leave(self) -> None:
        """Have others take what this node had, which answers no more. Raises nothing."""
        ...


class FixedMembers:
    """These nodes, whatever becomes of them; this one while ``is_fit`` says so."""

    problem = ""

    def __init__(self, nodes: Iterable[str], is_fit: Callable[[], bool]) -> None:
        self._nodes = frozenset(nodes)
        self._is_fit = is_fit

    def alive(self) -> Set[str]:
        """As :meth:`Members.alive`."""
        return self._nodes if self._is_fit() else frozenset()

    async def run(self) -> None:
        """As :meth:`Members.run`."""

    async def leave(self) -> None:
        """As :meth:`Members.leave`."""


class _Client(LeaseClient, Requests, Protocol):
    """What is asked of :class:`svcdp.kube.client.Client`."""


class LeaseMembers:
    """The nodes that hold Leases in ``namespace``; this one while ``is_fit`` says so.

    ``duration`` (s) is that of its own; nodes may differ in it. ``clock`` counts seconds and never
    goes back. For one event loop.
    """

    def __init__(
        self,
        client: _Client,
        namespace: str,
        node_name: str,
        duration: int,
        is_fit: Callable[[], bool],
        *,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self.node_name = node_name
        self._duration = duration
        self._is_fit = is_fit
        self._clock = clock
        # One node's processes are one member: they answer for it by the same MAC address.
        name, labels = f"svcdp-node-{node_name}", {LABEL: "true"}
        self._lease = Lease(client, namespace, name, node_name, duration, labels, clock=clock)
        self._reflector = Reflector(
            client,
            lease_resource(namespace, f"{LABEL}=true"),
            self.see,
            self._say,
            retry=RETRY,
            silence=float(duration),  # own renewals come all the time
        )
        self._key = ObjectKey("Lease", namespace, name)
        self._seen: dict[ObjectKey, Observation] = {}
        self._gone: set[ObjectKey] = set()
        self._written: dict[str, float] = {}  # own writes by their renewTime: when each began
        self._shown = ""  # the renewTime of the own Lease in the watch
        self._confirmed = self._last = float("-inf")  # when writes began: shown, and any
        self._since: float | None = None  # it holds its Lease without a break; None: it does not
        self._lost = ""

    @property
    def problem(self) -> str:
        """As :attr:`Members.problem`."""
        return self._lost or "; ".join(map(str, self._reflector.errors))

    def alive(self) -> Set[str]:
        """As :meth:`Members.alive`."""
        now = self._clock()
        if self._since is None or not self._is_fit():
            return frozenset()
        longest = max((self._duration, *(each.duration for each in self._seen.values())))
        if now < self._since + longest or now >= self._confirmed + self._duration:
            return frozenset()
        holders = {each.holder(self._confirmed) for each in self._seen.values()}
        return frozenset({*holders, self.node_name} - {""})

    async def run(self) -> None:
        """As :meth:`Members.run`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reflector.run())
            tasks.create_task(self._renew())

    async def leave(self) -> None:
        """As :meth:`Members.leave`."""
        self._since = None
        try:
            async with asyncio.timeout(self._duration):
                await self._lease.release()
        except (ApiError, TimeoutError) as error:  # it expires
            log.warning("a Lease could not be released", extra={"error": _text(error)})

    async def renew(self) -> None:
        """Write this node's Lease once. Raises ApiError, TimeoutError."""
        started = self._clock()
        async with asyncio.timeout(self._duration / 2):
            held = await self._lease.acquire()
        if not held:
            self._since = None
            return
        # Others may have taken this node for dead since the write before.
        if self._since is None or self._clock() > self._last + self._duration:
            self._since = self._clock()
        self._last = started
        self._written[self._lease.renew_time] = started
        self._confirm()

    def see(self, changes: Mapping[ObjectKey, LeaseRecord | None]) -> None:
        """For a :class:`svcdp.kube.reflector.Reflector`. A Lease that is gone expires."""
        now = self._clock()
        for key, record in changes.items():
            if record is None:
                self._gone.add(key)
                continue
            self._gone.discard(key)
            self._seen.setdefault(key, Observation()).see(record.spec, now)
            if key == self._key:
                self._shown = record.spec.renew_time or ""
        self._confirm()

    def _confirm(self) -> None:
        shown = self._written.get(self._shown)
        if shown is None:
            return
        self._confirmed = max(self._confirmed, shown)
        self._written = {k: v for k, v in self._written.items() if v >= self._confirmed}
        for key in [key for key in self._gone if not self._seen[key].holder(self._confirmed)]:
            self._gone.remove(key)
            del self._seen[key]

    async def _renew(self) -> None:
        while True:
            started = self._clock()
            problem = ""
            try:
                if self._is_fit():
                    await self.renew()
                elif self._since is not None:
                    await self.leave()
            except (ApiError, TimeoutError) as error:
                problem = _text(error)
            if problem != self._lost:
                self._lost = problem
                self._say()
            period = self._duration / RENEWALS
            await asyncio.sleep(max(0.0, started + period - self._clock()))

    def _say(self) -> None:
        if self.problem:
            log.warning("no address can be announced for long", extra={"error": self.problem})


def _text(error: Exception) -> str:
    return str(error) or "no answer in time"
