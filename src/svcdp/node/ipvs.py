"""Services as ipvsadm's lines say them, and what ``svcdp ipvs`` asks of a daemon."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from svcdp.abc import Sink
from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError, SvcdpError
from svcdp.ipvs.counters import Id, ZeroedCounters
from svcdp.ipvs.estimator import INTERVAL, Estimator
from svcdp.ipvs.listing import ListedService
from svcdp.ipvs.names import SystemNames
from svcdp.ipvs.restore import STATES, parse
from svcdp.node.admin import Handler
from svcdp.records import Key
from svcdp.status import ServiceStatus
from svcdp.types import ServiceSpec, fwmark_key

__all__ = ["IpvsServices", "IpvsViews"]

log = logging.getLogger(__name__)

Request = Mapping[str, Any]
Item = dict[str, Any]

IDLE = 60.0  # seconds without a question after which rates are estimated no more


class IpvsServices:
    """What is served in place of Kubernetes' Services. For one event loop's thread."""

    def __init__(self, mode: Sink, dataplane: Dataplane) -> None:
        self._mode = mode
        self._dataplane = dataplane
        #: Those of the daemon's settings.
        self._timeouts = dataplane.timeouts
        #: Why the file was not loaded again, or "".
        self.problem = ""
        self._held: dict[Key, ServiceSpec] = {}
        self._lock = asyncio.Lock()
        self._reloading: asyncio.Task[None] | None = None

    @property
    def specs(self) -> list[ServiceSpec]:
        """As they were given, in their order."""
        return [*self._held.values()]

    async def load(self, file: str) -> None:
        """Serve what a file says, and nothing else. ConfigError."""
        try:
            text = await asyncio.to_thread(Path(file).read_text, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from None
        try:
            await self.restore(text)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    def reload(self, file: str) -> None:
        """Begin to load again. After an error what was served before is."""
        self._reloading = asyncio.create_task(self._reload(file))

    async def _reload(self, file: str) -> None:
        try:
            await self.load(file)
        except SvcdpError as error:
            self.problem = str(error)
            log.error("serving what was served before", extra={"error": self.problem})

    async def restore(self, text: str, *, edit: bool = False) -> frozenset[Key]:
        """Serve what the lines say, and nothing else; or (``edit``) run them on what is served.
        Connections of what stays go on. All or nothing: :class:`svcdp.SvcdpError`. Returns the
        services whose counters the lines set to zero.
        """
        async with self._lock:
            base = self.specs if edit else []
            specs, chosen, zeroed = await asyncio.to_thread(parse, text, SystemNames(), base)
            wanted = {spec.key: spec for spec in specs}
            changed = [spec for key, spec in wanted.items() if self._held.get(key) != spec]
            removed = [key for key in self._held if key not in wanted]
            if changed or removed:
                await asyncio.to_thread(self._mode.update, changed, removed)
            self._held = wanted
            self.problem = ""
            # Of all services, also those to come: as in IPVS.
            before = self._dataplane.timeouts if edit else self._timeouts
            self._dataplane.configure_timeouts({**before, **chosen})
        log.info(
            "in force",
            extra={"services": len(specs), "servers": sum(len(s.destinations) for s in specs)},
        )
        return zeroed


class IpvsViews:
    """What ``svcdp ipvs`` is told by a daemon. ``services`` is None with Kubernetes' Services."""

    def __init__(self, dataplane: Dataplane, services: IpvsServices | None) -> None:
        self._dataplane = dataplane
        self._services = services
        self._counters = ZeroedCounters()
        self._rates = RateMeter(dataplane)

    async def close(self) -> None:
        """Estimate rates no more."""
        await self._rates.close()

    def handlers(self) -> dict[str, Handler]:
        """By the name of what they get."""
        return {
            "ipvs": self.listing,
            "ipvs-info": self.info,
            "ipvs-specs": self.specs,
            "ipvs-connections": self.connections,
            "ipvs-restore": self.restore,
            "ipvs-zero": self.zero,
        }

    def info(self, request: Request) -> Iterator[Item]:
        """The size of the connection table, and the timeouts that ``--set`` sets."""
        timeouts = self._dataplane.timeouts
        yield {
            "size": self._dataplane.max_connections,
            "timeouts": {state: timeouts[state] for state in STATES},
        }

    async def listing(self, request: Request) -> Iterator[Item]:
        """Services as `ListedService`, with "rates" or "persistent" if they are asked for; the
        one of "service" if that is given.
        """
        estimator = await self._rates.estimator() if request.get("rates") else Estimator()
        bound: Counter[Id] = Counter()
        if request.get("persistent"):
            bound = await asyncio.to_thread(self._bound)
        return (
            msgspec.to_builtins(
                ListedService(
                    self._counters.since(status),
                    estimator.rates(status),
                    tuple(bound[status.spec.key, d.address, d.port] for d in status.destinations),
                )
            )
            for status in self._wanted(request)
        )

    def zero(self, request: Request) -> Iterator[Item]:
        """Count anew what `listing` shows: of all services, or of that of "service"."""
        self._zero(self._wanted(request), everything=request.get("service") is None)
        return iter(())

    def _zero(self, services: Sequence[ServiceStatus], *, everything: bool = False) -> None:
        self._counters.zero(services, everything=everything)
        self._rates.zero(services)

    def _wanted(self, request: Request) -> list[ServiceStatus]:
        """The service that a request names by its key, or all."""
        services = [each for each in self._dataplane.services() if each.spec.protocol != "any"]
        name = request.get("service")
        if name is None:
            return services
        try:
            key = msgspec.convert(name, Key)
        except msgspec.ValidationError:
            raise ConfigError("service is not [address, port, protocol]") from None
        found = [status for status in services if status.spec.key == key]
        if not found:
            raise ConfigError(f"there is no service {ServiceSpec(*key)}")
        return found

    def _bound(self) -> Counter[Id]:
        """How many clients each destination of a service has for itself."""
        counts: Counter[Id] = Counter()
        for each in self._dataplane.export_connections():
            if each.is_template:
                key = (each.virtual, each.virtual_port, each.protocol)
                if each.fwmark:
                    key = fwmark_key(each.fwmark, 6 if ":" in each.virtual else 4)
                counts[key, each.destination, each.destination_port] += 1
        return counts

    def specs(self, request: Request) -> Iterator[Item]:
        """What is served, as it was asked for."""
        if self._services is not None:
            specs = self._services.specs
        else:
            specs = [status.spec for status in self._dataplane.services()]
        return (msgspec.to_builtins(spec) for spec in specs)

    def connections(self, request: Request) -> Iterator[Item]:
        """Connections and persistence templates, as `svcdp.ConnectionState`."""
        return (msgspec.to_builtins(each) for each in self._dataplane.export_connections())

    async def restore(self, request: Request) -> Iterator[Item]:
        """Run the lines in "text", on what is served if "edit" is true."""
        if self._services is None:
            raise ConfigError("it serves manifests: to serve ipvsadm's lines, start it with --ipvs")
        text = request.get("text")
        if not isinstance(text, str):
            raise ConfigError("text is missing")
        zeroed = await self._services.restore(text, edit=request.get("edit") is True)
        if zeroed:
            self._zero([s for s in self._dataplane.services() if s.spec.key in zeroed])
        return iter(())


class RateMeter:
    """Estimates rates from the first question on, until nobody has asked for a while: to look at
    all counters each 2 s is not for free.
    """

    def __init__(self, dataplane: Dataplane) -> None:
        self._dataplane = dataplane
        self._estimator = Estimator()
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._asked = 0.0

    async def estimator(self) -> Estimator:
        """What is known now. The first answer takes as long as an interval."""
        self._asked = time.monotonic()
        if self._task is None or self._task.done():
            self._ready.clear()
            self._task = asyncio.create_task(self._estimate())
        await self._ready.wait()
        return self._estimator

    def zero(self, services: Sequence[ServiceStatus]) -> None:
        """Begin averages anew."""
        self._estimator.zero(services)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _estimate(self) -> None:
        self._estimator = Estimator()
        try:
            await self._feed()
            while True:
                await asyncio.sleep(INTERVAL)
                await self._feed()
                self._ready.set()
                if time.monotonic() > self._asked + IDLE:
                    return
        finally:
            self._ready.set()  # whatever happened: nobody waits for ever

    async def _feed(self) -> None:
        services = await asyncio.to_thread(self._dataplane.services)
        self._estimator.feed(services, time.monotonic())
