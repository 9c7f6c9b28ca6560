"""Where both sides meet: source -> state -> resolve -> diff -> one update of a proxy mode."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from svcdp.abc import Sink, Source
from svcdp.errors import ClosedError, SourceError, SvcdpError
from svcdp.kube.claims import Key
from svcdp.kube.context import NodeContext
from svcdp.kube.endpoints import EndpointInfo, PortKey, endpoints_by_port, usable_endpoints
from svcdp.kube.events import Event, Recorder
from svcdp.kube.health import HealthCheck
from svcdp.kube.model import (
    EndpointSlice,
    LoadBalancerPool,
    ObjectKey,
    Pod,
    Service,
    ServiceRef,
)
from svcdp.kube.state import Change
from svcdp.kube.tracker import Tracker
from svcdp.types import ServiceSpec

__all__ = [
    "Counts",
    "EndpointStatus",
    "Progress",
    "ServiceChange",
    "ServiceStatus",
    "Subscriber",
    "Sync",
    "Update",
]

log = logging.getLogger(__name__)

_SLICE = 0.01  #: seconds for which the event loop is held while Services are resolved


class Counts(NamedTuple):
    """How many there are now: ``endpoints`` in slices, ``specs`` in force."""

    services: int
    slices: int
    endpoints: int
    specs: int
    problems: int


class ServiceChange(NamedTuple):
    """A Service as it is now, or None, and all EndpointSlices that name it; hidden ones too."""

    ref: ServiceRef
    service: Service | None
    slices: Sequence[EndpointSlice]


Subscriber = Callable[[Sequence[ServiceChange]], None]


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A Service, the specs it holds, and its endpoints: all, and those that may be used.

    An endpoint that serves several ports counts once.
    """

    service: Service
    specs: tuple[ServiceSpec, ...]
    endpoints: int
    endpoints_ready: int


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint of one port of a Service. ``protocol`` is lower case."""

    namespace: str
    service: str
    port_name: str
    protocol: str
    address: str
    port: int
    ready: bool
    serving: bool
    terminating: bool
    node: str
    target: str


@dataclass(frozen=True, slots=True)
class Update:
    """One attempt to bring changes into force.

    ``triggers``: when what is in force now was changed, as EndpointSlices say (RFC 3339, as it
    was written).
    """

    seconds: float
    error: Exception | None
    triggers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far behind the sources this node is. Times are in seconds.

    ``changed`` are the Services and EndpointSlices that came, went or became different since
    the start, ``pending`` those of which the mode has not been told. ``waiting_since``: when the
    oldest of these came (``time.monotonic()``). ``queued`` and ``updated``: when the last
    change came, and when the last update succeeded (since 1970; 0: never). ``unread_since``:
    since when a source cannot be read (monotonic).
    """

    changed: Mapping[str, int]
    pending: Mapping[str, int]
    waiting_since: float | None
    queued: float
    updated: float
    unread_since: float | None
    failure: Exception | None


@dataclass(slots=True)
class _Followed:
    source: Source
    rank: int
    listed: bool = False
    in_force: bool = False  # what was listed is
    lost: SvcdpError | None = None
    unread_since: float | None = None
    task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Note since when the source cannot be read."""
        if self.lost is None and not any(isinstance(e, SourceError) for e in self.source.errors):
            self.unread_since = None
        elif self.unread_since is None:
            self.unread_since = time.monotonic()


class Sync:
    """Keeps a proxy mode true to what sources say. An asynchronous context manager.

    ``mode.update`` runs in a worker thread, never twice at a time; what arrives meanwhile goes
    into the next one. Nothing is sent before every source followed so far has been listed once.
    An update that raises is tried again, with all that came since, after ``retry`` seconds
    (the first wait and the longest). The mode is not closed. ``on_update`` is told of each try,
    in the event loop's thread, and ``record`` of what is wrong with Services.
    Methods and properties are for the event loop's thread.
    """

    def __init__(
        self,
        mode: Sink,
        node: NodeContext,
        *,
        retry: tuple[float, float] = (0.5, 30.0),
        on_update: Callable[[Update], None] = lambda update: None,
        record: Recorder = lambda event: None,
    ) -> None:
        self._mode = mode
        self._tracker = Tracker(node)
        self._retry = retry
        self._on_update = on_update
        self._record = record
        self._recorded: set[Event] = set()
        self._followed: list[_Followed] = []
        self._inbox: list[tuple[int, str, Change]] = []
        self._sent: dict[Key, ServiceSpec] = {}
        self._failure: Exception | None = None
        self._triggers: list[str] = []
        self._in_force: Counter[str] = Counter()  # of state.changed
        self._subscribers: list[Subscriber] = []
        self._inbox_since: float | None = None
        self._taken_since: float | None = None
        self._queued = self._updated = 0.0
        self._reported: dict[str, None] = {}
        self._generation = 0
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._progress = asyncio.Condition()
        self._worker: asyncio.Task[None] | None = None

    def follow(self, source: Source) -> None:
        """Take objects from a source, before or inside ``async with``.

        Where two sources have the same object, the one followed first counts.
        """
        if self._stop.is_set():
            raise ClosedError("this Sync has ended")
        followed = _Followed(source, rank=len(self._followed))
        self._followed.append(followed)
        if self._worker is not None:
            self._start(followed)

    def renumber(self, addresses: Iterable[str]) -> None:
        """The node has these addresses now: node ports and masquerading follow.

        ConfigError where one is none.
        """
        self._tracker.renumber(addresses)
        self._wake.set()

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call it with the Services that changed, or whose EndpointSlices did, each time that
        they are in force: in the event loop's thread, so it must be quick.

        It learns of what comes into force from now on: subscribe before the first list is.
        """
        self._subscribers.append(subscriber)

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work())
        for followed in self._followed:
            self._start(followed)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._wake.set()
        tasks = [followed.task for followed in self._followed if followed.task]
        for task in tasks:
            task.cancel()
        assert self._worker is not None
        await asyncio.gather(*tasks, self._worker, return_exceptions=True)
        if error is None:
            self._worker.result()  # raises what ended it, if that was an error

    async def ready(self) -> None:
        """Until the first full list of every source is in force.

        Raises SourceError if a source failed before that, ClosedError after the end.
        """

        def reached() -> bool:
            for followed in self._followed:
                if followed.lost is not None and not followed.listed:
                    raise followed.lost
            return bool(self._followed) and all(each.in_force for each in self._followed)

        await self._until(reached)

    async def wait(self, after: int) -> int:
        """Until :attr:`generation` is above ``after``; returns it. Raises like :meth:`ready`."""
        await self._until(lambda: self._generation > after)
        return self._generation

    @property
    def generation(self) -> int:
        """How many batches of changes are in force."""
        return self._generation

    @property
    def problems(self) -> list[SvcdpError]:
        """All that is wrong now: sources, files, Services, conflicts, the last update."""
        found: list[SvcdpError] = []
        for followed in self._followed:
            found += followed.source.errors
            if followed.lost is not None:
                found.append(followed.lost)
        found += self._tracker.problems()
        if self._failure is not None:
            found.append(SvcdpError(f"update failed, will be tried again: {self._failure}"))
        return found

    @property
    def counts(self) -> Counts:
        """How much of everything there is."""
        state = self._tracker.state
        return Counts(
            services=len(state.services),
            slices=state.slice_count(),
            endpoints=state.endpoint_count(),
            specs=len(self._sent),
            problems=len(self.problems),
        )

    @property
    def progress(self) -> Progress:
        """How far behind the sources this node is."""
        for followed in self._followed:
            followed.look()
        changed = self._tracker.state.changed
        pending = changed - self._in_force
        for _, _, change in self._inbox:
            pending.update(type(found).__name__ for found in change.objects)
            pending.update(key.kind for key in change.deleted)
        unread = [each.unread_since for each in self._followed if each.unread_since is not None]
        return Progress(
            changed=changed.copy(),
            pending=pending,
            waiting_since=self._inbox_since if self._taken_since is None else self._taken_since,
            queued=self._queued,
            updated=self._updated,
            unread_since=min(unread, default=None),
            failure=self._failure or self._ended_by(),
        )

    def _ended_by(self) -> Exception | None:
        """What ended the worker before its time: a bug."""
        worker = self._worker
        if worker is None or not worker.done() or worker.cancelled():
            return None
        error = worker.exception()
        return error if isinstance(error, Exception) else None

    @property
    def node(self) -> NodeContext:
        """The node, as settings and sources say it."""
        return self._tracker.node

    @property
    def is_eligible(self) -> bool:
        """Whether load balancers may send to this node, as its Node says."""
        return self._tracker.is_eligible

    @property
    def is_excluded(self) -> bool:
        """Whether a label of its Node keeps load balancers' addresses from this node."""
        return self._tracker.is_excluded

    def health_checks(self) -> list[HealthCheck]:
        """What health-check node ports have to say; by Service."""
        return self._tracker.health_checks()

    def without_local_endpoints(self) -> tuple[int, int]:
        """As of :class:`svcdp.kube.tracker.Tracker`."""
        return self._tracker.without_local_endpoints()

    def uid(self, key: ObjectKey) -> str:
        """As of :class:`svcdp.kube.tracker.Tracker`."""
        return self._tracker.uid(key)

    def declared(self, namespace: str | None = None, name: str | None = None) -> list[Service]:
        """The Services as they were written, by namespace and name: all, those of a namespace, or
        the one of a name in it.
        """
        services = self._tracker.state.services
        if namespace is not None and name is not None:
            return list(filter(None, [services.get(ServiceRef(namespace, name))]))
        return [services[ref] for ref in sorted(services) if namespace in (None, ref.namespace)]

    def services(
        self, namespace: str | None = None, name: str | None = None
    ) -> list[ServiceStatus]:
        """What became of those of :meth:`declared`. Looks at all their endpoints."""
        return [self._status(each.ref) for each in self.declared(namespace, name)]

    def pods(self) -> list[tuple[Pod, list[ServiceRef]]]:
        """As of :class:`svcdp.kube.state.State`."""
        return self._tracker.state.pods()

    def pools(self) -> list[LoadBalancerPool]:
        """LoadBalancerPools of the sources, by name."""
        pools = self._tracker.state.pools
        return [pools[name] for name in sorted(pools)]

    def endpoints(
        self, namespace: str | None = None, name: str | None = None
    ) -> list[EndpointStatus]:
        """The endpoints of those of :meth:`declared`."""
        return [
            EndpointStatus(
                namespace=ref.namespace,
                service=ref.name,
                port_name=key.name,
                protocol=key.protocol.lower(),
                address=endpoint.address,
                port=endpoint.port,
                ready=endpoint.ready,
                serving=endpoint.serving,
                terminating=endpoint.terminating,
                node=endpoint.node,
                target=endpoint.target,
            )
            for ref in (each.ref for each in self.declared(namespace, name))
            for key, endpoints in sorted(self._endpoints(ref).items())
            for endpoint in endpoints
        ]

    def _endpoints(self, ref: ServiceRef) -> dict[PortKey, list[EndpointInfo]]:
        return endpoints_by_port(self._tracker.state.slices(ref), self._tracker.node)

    def _status(self, ref: ServiceRef) -> ServiceStatus:
        groups = self._endpoints(ref).values()
        return ServiceStatus(
            service=self._tracker.state.services[ref],
            specs=tuple(s for s in self._tracker.claims.held_by(ref) if s.protocol != "any"),
            endpoints=len({each.address for group in groups for each in group}),
            endpoints_ready=len(
                {each.address for group in groups for each in usable_endpoints(group)}
            ),
        )

    def _all_listed(self) -> bool:
        return bool(self._followed) and all(followed.listed for followed in self._followed)

    def _start(self, followed: _Followed) -> None:
        followed.task = asyncio.create_task(self._read(followed))

    async def _read(self, followed: _Followed) -> None:
        """The task of one source."""
        source = followed.source
        pause, longest = self._retry
        while True:
            try:
                async for batch in source.changes():
                    self._put(followed, batch)
                    followed.listed = True
                    followed.lost = None
                    followed.look()
                    pause = self._retry[0]
                    self._wake.set()
                if followed.listed:
                    return  # it has said all that it will ever say
                followed.lost = SourceError(f"{source.name}: ended before its first list")
            except SvcdpError as error:
                followed.lost = error
            except Exception as error:  # a bug in one source; the others must go on
                log.exception("%s: failed", source.name)
                followed.lost = SourceError(f"{source.name}: {error!r}")
            followed.look()
            self._report()
            await self._notify()
            if not followed.listed:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    def _put(self, followed: _Followed, batch: Sequence[Change]) -> None:
        self._inbox += [(followed.rank, followed.source.name, change) for change in batch]
        if batch:
            self._queued = time.time()
            if self._inbox_since is None:
                self._inbox_since = time.monotonic()

    async def _work(self) -> None:
        """The one task that resolves and updates."""
        dirty: set[Key] = set()
        pause, longest = self._retry
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                if self._stop.is_set():
                    return
                if not self._all_listed():
                    continue
                batch, self._inbox = self._inbox, []
                if self._taken_since is None:
                    self._taken_since = self._inbox_since
                self._inbox_since = None
                listed = [followed for followed in self._followed if followed.listed]
                await self._take(batch, dirty)
                self._triggers += self._tracker.take_triggers()
                began = time.monotonic()
                try:
                    await self._update(dirty)
                except Exception as error:  # whatever it is, the state must not be lost
                    log.debug("update failed", exc_info=True)
                    self._failure = error
                    self._on_update(Update(time.monotonic() - began, error))
                    self._report()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stop.wait(), pause)
                    pause = min(pause * 2, longest)
                    self._wake.set()
                    continue
                dirty.clear()
                self._failure = None
                self._settle(time.monotonic() - began)
                self._tell_subscribers()
                pause = self._retry[0]
                self._tell_events()
                self._generation += 1
                for followed in listed:
                    followed.in_force = True
                self._report()
                await self._notify()
        except Exception:
            log.exception("changes are no longer taken")
            raise
        finally:
            await self._notify()

    async def _take(self, batch: Iterable[tuple[int, str, Change]], dirty: set[Key]) -> None:
        """Resolve what a batch touches, and let others have the event loop now and then."""
        pause = time.monotonic() + _SLICE
        for keys in self._tracker.steps(batch):
            dirty |= keys
            if time.monotonic() > pause:
                await asyncio.sleep(0)
                pause = time.monotonic() + _SLICE

    def _settle(self, seconds: float) -> None:
        """All that was taken is in force."""
        self._updated = time.time()
        self._taken_since = None
        self._in_force = self._tracker.state.changed.copy()
        triggers, self._triggers = tuple(self._triggers), []
        self._on_update(Update(seconds, None, triggers))

    async def _update(self, keys: Iterable[Key]) -> None:
        """Send what differs from what was sent."""
        specs: list[ServiceSpec] = []
        removed: list[Key] = []
        for key in sorted(keys):
            spec = self._tracker.spec(key)
            if spec is None:
                if key in self._sent:
                    removed.append(key)
            elif spec != self._sent.get(key):
                specs.append(spec)
        if not specs and not removed:
            return
        await asyncio.to_thread(self._mode.update, specs, removed)
        self._sent.update((spec.key, spec) for spec in specs)
        for key in removed:
            del self._sent[key]

    def _report(self) -> None:
        """Log each problem once, when it comes up and when it is over."""
        now = dict.fromkeys(map(str, self.problems))
        for text in now:
            if text not in self._reported:
                log.warning("%s", text)
        for text in self._reported.keys() - now.keys():
            log.info("no longer so: %s", text)
        self._reported = now

    def _tell_subscribers(self) -> None:
        touched, self._tracker.touched = self._tracker.touched, set()
        if not touched:
            return
        state = self._tracker.state
        changes = [
            ServiceChange(ref, state.services.get(ref), state.slices(ref))
            for ref in sorted(touched)
        ]
        for subscriber in self._subscribers:
            try:
                subscriber(changes)
            except Exception:  # a bug in one of them; packets must go on
                log.exception("a subscriber failed")

    def _tell_events(self) -> None:
        """Of what came up; if it goes and comes again, again."""
        now = self._tracker.events()
        for followed in self._followed:
            now += getattr(followed.source, "events", ())
        for event in now:
            if event not in self._recorded:
                self._record(event)
        self._recorded = set(now)

    async def _notify(self) -> None:
        async with self._progress:
            self._progress.notify_all()

    async def _until(self, reached: Callable[[], bool]) -> None:
        async with self._progress:
            while True:
                if self._worker is None:
                    raise ClosedError("Sync works inside `async with` only")
                if self._worker.done():
                    self._worker.result()  # raises what ended it, if that was an error
                    raise ClosedError("this Sync has ended")
                if reached():
                    return
                await self._progress.wait()
