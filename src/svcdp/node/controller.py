"""The controller of a cluster's LoadBalancerPools: gives Services addresses, by their status.

Of several replicas the one that holds a Lease does, and reads the cluster anew when it comes to
hold it: what it gives next goes by all that was given before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from svcdp._version import __version__
from svcdp.errors import ConfigError, ManifestError, SourceError
from svcdp.kube.apiserver import POOLS, explained
from svcdp.kube.assign import (
    MANAGER,
    Assignment,
    Decision,
    ObservedPool,
    ObservedService,
    decide,
    decode_service,
)
from svcdp.kube.events import Event, Recorder
from svcdp.kube.leases import Lease
from svcdp.kube.model import LoadBalancerPool, ObjectKey
from svcdp.kube.pools import Usage, usages, with_addresses
from svcdp.kube.publisher import EventPublisher, Writes
from svcdp.kube.reflector import (
    ABSENT,
    CONFLICT,
    FORBIDDEN,
    ApiError,
    Reflector,
    Requests,
    Resource,
)
from svcdp.node.http import HttpServer, Place, Response, report, routed
from svcdp.node.metrics import CONTENT_TYPE

__all__ = ["Controller", "ControllerConfig", "run"]

log = logging.getLogger(__name__)

BALANCED = Resource("services", "Service", "/api/v1/services", decode_service)

LEASE = "svcdp-controller"
RENEWALS = 6  # tries to renew the Lease, or to get it, while one would last
PERIOD = 0.25  # seconds between two looks at the cluster: what comes meanwhile is one change
BATCH = 250  # Services written between two looks
RELEASE_TIME = 5.0  # seconds to leave the Lease to others when stopping
REFUSALS = 10  # writes that fail in one look: then others have their turn in the next one
RETRY = (0.5, 10.0)  # seconds after an error: the first wait and the longest
#: What is wrong with the server, as all from 500 on is; other refusals may be about one Service.
UNAVAILABLE = (0, 401, 408, 429)


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """``kubeconfig``: "" is the Pod's service account. ``lease_duration``: seconds after which
    another one takes over when nothing more is heard. ``class_only``: Services without a
    ``loadBalancerClass`` are somebody else's. ``place``: where probes and metrics are served.
    """

    kubeconfig: str = ""
    lease_namespace: str = "svcdp"
    lease_duration: int = 15
    class_only: bool = False
    place: Place | None = None


def run(config: ControllerConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises :class:`svcdp.SvcdpError` for what ends it."""
    asyncio.run(_run(config))


async def _run(config: ControllerConfig) -> None:
    serving = asyncio.create_task(_serve(config))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    log.info("stopped")


async def _serve(config: ControllerConfig) -> None:
    from svcdp.kube.client import Client

    async with contextlib.AsyncExitStack() as undo:
        client = Client(config.kubeconfig or None)
        undo.push_async_callback(client.close)
        host = socket.gethostname()
        # No two processes are the same, also not one and its successor.
        identity = f"{host}_{secrets.token_hex(4)}"
        lease = Lease(client, config.lease_namespace, LEASE, identity, config.lease_duration)
        publisher = EventPublisher(client, host, lambda key: controller.uid(key))
        undo.push_async_callback(_end, asyncio.create_task(publisher.run()))
        controller = Controller(client, lease, publisher.record, class_only=config.class_only)
        if config.place is not None:
            server = _web(controller)
            undo.push_async_callback(server.close)
            try:
                await server.listen(config.place)
            except OSError as error:
                where = "{} port {}".format(*config.place)
                raise ConfigError(f"cannot listen at {where}: {error.strerror or error}") from None
        log.info("started", extra={"lease": f"{config.lease_namespace}/{LEASE}", "as": identity})
        await controller.run()


class _Client(Requests, Writes, Protocol):
    """What is asked of :class:`svcdp.kube.client.Client`."""


class Controller:
    """Has Services' addresses in their status as long as ``lease`` is held, which it looks after.

    ``retry``: first and longest wait after an error, in seconds. For one event loop.
    """

    def __init__(
        self,
        client: _Client,
        lease: Lease,
        record: Recorder,
        *,
        class_only: bool = False,
        retry: tuple[float, float] = RETRY,
    ) -> None:
        self._client = client
        self._lease = lease
        self._tell = record
        self._class_only = class_only
        self._retry = retry
        self._term: _Term | None = None
        self._lease_error = ""
        #: How often a status was ``written``, was no longer as it was seen (``conflict``), or
        #: could not be written (``failed``).
        self.writes: Counter[str] = Counter()

    @property
    def is_leader(self) -> bool:
        """Whether it writes, not another one."""
        return self._lease.is_held

    def checks(self) -> dict[str, bool]:
        """What readiness goes by: each check, and whether it passes."""
        term = self._term
        return {
            "lease": not self._lease_error,
            "sources": term is None or term.is_informed,
            "writes": term is None or not term.is_refused,
        }

    def usages(self) -> list[Usage]:
        """Of each pool, where this is the leader."""
        return self._term.usages() if self._term else []

    def lacking(self) -> int:
        """How many Services go without an address, where this is the leader."""
        return self._term.decision.lacking if self._term else 0

    def uid(self, key: ObjectKey) -> str:
        """Of an object that there are events about."""
        return self._term.uid(key) if self._term else ""

    async def run(self) -> None:
        """Until cancelled: then the Lease is left to others. Raises for a bug alone."""
        leading: asyncio.Task[None] | None = None
        pause = self._lease.duration / RENEWALS
        try:
            while True:
                await self._contend()
                if self._lease.is_held and leading is None:
                    log.info("leading")
                    self._term = _Term(
                        self._client,
                        self._lease,
                        self._tell,
                        self.writes,
                        self._class_only,
                        self._retry,
                    )
                    leading = asyncio.create_task(self._term.run())
                elif leading is not None and not self._lease.is_held:
                    log.warning("no longer leading", extra={"holder": self._lease.holder})
                    await _end(leading)
                    leading = self._term = None
                if leading is None:
                    await asyncio.sleep(pause)
                    continue
                # Whether or not it was renewed, it is not led for longer than it is held.
                done, _ = await asyncio.wait({leading}, timeout=min(pause, self._lease.remaining))
                for task in done:
                    task.result()
        finally:
            if leading is not None:
                await _end(leading)
                await self._release()

    async def _contend(self) -> None:
        """Have the Lease or renew it, if that can be."""
        error = ""
        try:
            async with asyncio.timeout(self._lease.remaining or self._lease.duration):
                await self._lease.acquire()
        except TimeoutError:
            error = f"the Lease {self._lease.name}: no answer in time"
        except ApiError as failed:
            error = str(failed)
        if error and error != self._lease_error:
            log.warning("%s", error)
        self._lease_error = error

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIME):
                await self._lease.release()
        except (ApiError, TimeoutError) as error:
            log.warning("the Lease runs out by itself", extra={"error": str(error)})


class _Term:
    """The time in which a controller holds the Lease, and what it knows of the cluster then."""

    def __init__(
        self,
        client: _Client,
        lease: Lease,
        record: Recorder,
        writes: Counter[str],
        class_only: bool,
        retry: tuple[float, float],
    ) -> None:
        self._client = client
        self._lease = lease
        self._tell = record
        self._writes = writes
        self._class_only = class_only
        self._retry = retry
        self._services: dict[ObjectKey, ObservedService] = {}
        self._pools: dict[ObjectKey, ObservedPool] = {}
        self._usable: dict[ObjectKey, LoadBalancerPool] = {}
        #: What was written last, and the versions that it and writes before it replaced, until the
        #: server tells of a later one.
        self._written: dict[ObjectKey, tuple[set[str], ObservedService]] = {}
        self._wake = asyncio.Event()
        self._told: set[Event] = set()
        self._said: set[str] = set()
        self._reflectors: tuple[Reflector[Any], ...] = (
            Reflector(client, BALANCED, self._take_services, self._wake.set, retry=retry),
            Reflector(client, POOLS, self._take_pools, self._wake.set, retry=retry),
        )
        #: Writes that failed, and why ("": there was a newer version), until they are tried again.
        self._failed: dict[ObjectKey, tuple[Assignment, str]] = {}
        self._pause = retry[0]
        self._is_due = True  # what failed is to be tried again
        self._is_unavailable = False  # and until then nothing else is tried
        self.decision = Decision((), (), 0)

    @property
    def is_refused(self) -> bool:
        """Whether a status could not be written, and still cannot as far as is known."""
        return any(text for _, text in self._failed.values())

    @property
    def is_informed(self) -> bool:
        """Whether all that there is was read, and is followed."""
        return all(
            each.listed and not any(isinstance(error, SourceError) for error in each.errors)
            for each in self._reflectors
        )

    def usages(self) -> list[Usage]:
        """Of each pool."""
        return usages(self._usable.values(), (each.service for each in self._observed()))

    def uid(self, key: ObjectKey) -> str:
        """Of a Service or pool."""
        if key.kind == "LoadBalancerPool":
            return self._pools[key].uid if key in self._pools else ""
        return (key in self._services and self._services[key].service.metadata.uid) or ""

    async def run(self) -> None:
        """Until cancelled."""
        tasks = [asyncio.create_task(each.run()) for each in self._reflectors]
        for task in tasks:
            task.add_done_callback(lambda _: self._wake.set())
        try:
            await self._work(tasks)
        finally:
            for task in tasks:
                await _end(task)

    async def _work(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            for task in tasks:
                if task.done():
                    task.result()  # raises what ended it: a bug
            self._say()
            if all(each.listed for each in self._reflectors):
                await self._decide()
                await self._write()
            await asyncio.sleep(PERIOD)

    async def _decide(self) -> None:
        # Of thousands of Services it takes long, and the Lease does not wait.
        self.decision = await asyncio.to_thread(
            decide,
            list(self._observed()),
            list(self._usable.values()),
            class_only=self._class_only,
            is_partial=len(self._usable) < len(self._pools),
        )
        bad = [
            Event.of(each.key, "InvalidLoadBalancerPool", each.problem)
            for each in self._pools.values()
            if each.problem
        ]
        now = [*self.decision.events, *bad]
        for event in now:
            if event not in self._told:
                self._record(event)
        self._told = set(now)

    async def _write(self) -> None:
        """What is new first. What failed, as it was, is tried again after a while."""
        wanted = {each.service.key: each for each in self.decision.assignments}
        self._failed = {
            key: (each, text)
            for key, (each, text) in self._failed.items()
            if wanted.get(key) == each
        }
        again = [wanted.pop(key) for key in self._failed]
        tries = list(wanted.values())
        if self._is_due:
            self._is_unavailable = False
            tries += again
        elif self._is_unavailable:
            return
        failures, wait = 0, 0.0
        for each in tries[:BATCH]:
            if not self._lease.is_held:
                failures += 1
                break
            try:
                await self._patch(each)
            except ApiError as error:
                self._fail(each, error)
                failures, wait = failures + 1, max(wait, error.retry_after)
                self._is_unavailable = error.status in UNAVAILABLE or error.status >= 500
                if self._is_unavailable or failures == REFUSALS:
                    break
            else:
                self._failed.pop(each.service.key, None)
                self._writes["written"] += 1
                self._record(each.event)
        if failures:
            self._try_later(wait)
        elif len(tries) > BATCH:
            self._wake.set()
        if not self._failed:
            self._pause = self._retry[0]

    def _fail(self, assignment: Assignment, error: ApiError) -> None:
        key = assignment.service.key
        _, former = self._failed.pop(key, (None, ""))  # to be the last in turn
        text = ""
        if error.status in (ABSENT, CONFLICT):
            self._writes["conflict"] += 1
        else:
            self._writes["failed"] += 1
            text = _unwritten(assignment, error)
            if text != former:
                log.warning("%s", text)
        self._failed[key] = (assignment, text)

    def _try_later(self, least: float) -> None:
        if self._is_due:
            self._is_due = False
            wait = max(self._pause, least)
            asyncio.get_running_loop().call_later(wait, self._try_again)
            self._pause = min(self._pause * 2, self._retry[1])

    def _try_again(self) -> None:
        self._is_due = True
        self._wake.set()

    async def _patch(self, assignment: Assignment) -> None:
        """ApiError."""
        service = assignment.service
        status = with_addresses(service, assignment.after).status
        body = {"metadata": {"resourceVersion": assignment.version}, "status": status}
        path = f"/api/v1/namespaces/{quote(service.ref.namespace)}/services"
        path += f"/{quote(service.ref.name)}/status?fieldManager={MANAGER}"
        try:
            async with asyncio.timeout(self._lease.remaining):
                data = await self._client.patch(path, msgspec.json.encode(body))
        except TimeoutError:
            raise ApiError("no answer while this is the leader") from None
        with contextlib.suppress(ManifestError):  # what is followed says so, too
            written = decode_service(data)
            if service.key in self._services:  # it may have gone meanwhile
                replaced, _ = self._written.get(service.key, (set[str](), None))
                self._written[service.key] = (replaced | {assignment.version}, written)

    def _observed(self) -> Iterator[ObservedService]:
        """All Services, as they were written where nothing newer is known of them."""
        for key, each in self._services.items():
            replaced, written = self._written.get(key, ((), each))
            if each.version in replaced:
                yield written
            else:
                self._written.pop(key, None)
                yield each

    def _take_services(self, changed: Mapping[ObjectKey, ObservedService | None]) -> None:
        """Only of those that may have addresses: they are few of a cluster's."""
        for key, found in changed.items():
            if found is not None and found.matters:
                self._services[key] = found
            elif self._services.pop(key, None) is not None:
                self._written.pop(key, None)
            else:
                continue
            self._wake.set()

    def _take_pools(self, changed: Mapping[ObjectKey, ObservedPool | None]) -> None:
        """One that cannot be read counts as it was before."""
        for key, found in changed.items():
            if found is None:
                self._pools.pop(key, None)
                self._usable.pop(key, None)
                continue
            self._pools[key] = found
            if found.pool is not None:
                self._usable[key] = found.pool
        self._wake.set()

    def _say(self) -> None:
        """Log what is wrong, once."""
        now = [explained(error) for each in self._reflectors for error in each.errors]
        now += [str(each.problem) for each in self._services.values() if each.problem]
        for text in now:
            if text not in self._said:
                log.warning("%s", text)
        self._said = set(now)

    def _record(self, event: Event) -> None:
        level = logging.WARNING if event.type == "Warning" else logging.INFO
        extra = {"object": str(event.regarding), "reason": event.reason}
        log.log(level, event.message, extra=extra)
        self._tell(event)


def _unwritten(assignment: Assignment, error: ApiError) -> str:
    text = f"{assignment.service.key}: its status cannot be written: {error}"
    return text + " (grant the verb patch on services/status)" * (error.status == FORBIDDEN)


class _State(Collector):
    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def collect(self) -> Iterator[Metric]:
        controller = self._controller
        build = GaugeMetricFamily("svcdp_build_info", "Constant 1.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield GaugeMetricFamily(
            "svcdp_controller_leader", "Whether this replica gives addresses.", controller.is_leader
        )
        writes = CounterMetricFamily(
            "svcdp_controller_writes",
            "Statuses of Services, by what became of them.",
            labels=["result"],
        )
        for result in ("written", "conflict", "failed"):
            writes.add_metric([result], controller.writes[result])
        yield writes
        yield GaugeMetricFamily(
            "svcdp_controller_services_lacking",
            "Services that go without an address.",
            controller.lacking(),
        )
        addresses = GaugeMetricFamily(
            "svcdp_pool_addresses", "Addresses of a pool.", labels=["pool"]
        )
        used = GaugeMetricFamily(
            "svcdp_pool_addresses_used", "Those that Services have.", labels=["pool"]
        )
        for usage in controller.usages():
            addresses.add_metric([usage.pool.metadata.name], usage.addresses)
            used.add_metric([usage.pool.metadata.name], usage.used)
        yield addresses
        yield used


def _web(controller: Controller) -> HttpServer:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_State(controller))
    alive = Response(b"ok\n")
    return HttpServer(
        routed(
            {
                # What ends the work ends the process.
                "/healthz": lambda request: alive,
                "/livez": lambda request: alive,
                "/readyz": lambda request: report(controller.checks(), request),
                "/metrics": lambda request: Response(generate_latest(registry), CONTENT_TYPE),
            }
        )
    )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
