"""The node daemon: puts the parts together in the right order, and takes them apart again.

Start: bind the queues and set their flags, load what is to be served, go on with old
connections, install the rules; from the first captured packet on somebody answers. Stop: remove
the rules, let the queues run empty, save the connections, unbind. A failure at any step undoes
the steps before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator

from svcdp._version import __version__
from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError, SvcdpError
from svcdp.io import netns
from svcdp.io.nfqueue import QueueWorkers
from svcdp.kube import ApiServerSource, ManifestSource
from svcdp.kube.allocations import AllocatingSource
from svcdp.kube.allocationsfile import AllocationsFile
from svcdp.kube.balancers import BalancingSource
from svcdp.kube.events import Event
from svcdp.kube.model import ObjectKey
from svcdp.kube.publisher import EventPublisher
from svcdp.modes.nfqueue import NfqueueMode
from svcdp.node import views
from svcdp.node.admin import AdminServer, Handler
from svcdp.node.announcing import Announcing
from svcdp.node.capture import DNS_PORT, capture_plan, choose_backend
from svcdp.node.config import NodeConfig, settings
from svcdp.node.context import api_client, node_context
from svcdp.node.dns import DnsThread
from svcdp.node.health import Health
from svcdp.node.ipvs import IpvsServices, IpvsViews
from svcdp.node.localhost import LocalhostNodePorts
from svcdp.node.metrics import Metrics
from svcdp.node.network import NetworkWatch, claim_netns, discover_addresses
from svcdp.node.servicehealth import ServiceHealth
from svcdp.node.state import ConnectionStore
from svcdp.node.syncing import peers, sync_daemon
from svcdp.node.systemd import notify, watchdog_interval
from svcdp.node.web import Web
from svcdp.sync import Sync

__all__ = ["run"]

log = logging.getLogger(__name__)

TICK = 1.0  # seconds between rounds of housekeeping
SWEEP_ROUNDS = 16  # rounds in which the whole connection table is swept
TRIM_ROUNDS = 10  # rounds between two looks for captures that nobody needs any more
DRAIN_TIME = 2.0  # seconds for packets that were in the queues when the rules went
DRAIN_STEP = 0.02  # seconds between two looks at the queues
#: Young objects nearly all stay while a cluster is read: Python's 700 would look at them too often.
GC_THRESHOLDS = (50_000, 20, 20)
NO_ADDRESSES = "this node has no addresses: no node ports, no masquerading"
FIRST_RETRY = 0.5  # seconds until a failed update is tried again


def run(config: NodeConfig, reread: Callable[[], NodeConfig] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once.

    SIGHUP reads the manifests (or ipvsadm's lines) again, and, where ``reread`` is given, says
    which settings have changed and need a restart. Raises :class:`svcdp.SvcdpError` for what
    ends the daemon, after everything was taken back.
    """
    if not (config.manifests or config.kubeconfig or config.ipvs):
        raise ConfigError(
            "nothing to serve: give a folder with -f, a cluster with --kubeconfig, or lines with"
            " --ipvs"
        )
    if config.ipvs and (config.manifests or config.kubeconfig):
        name = "manifests" if config.manifests else "kubeconfig"
        raise ConfigError(f"{name} and ipvs exclude each other: serve one of them")
    if config.netns:
        netns.enter(config.netns)
    gc.set_threshold(*GC_THRESHOLDS)
    _allow_descriptors()
    asyncio.run(_Daemon(config, reread).main())


def _allow_descriptors() -> None:
    """As many as may be: each relayed port takes one, and each relayed connection two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("file descriptors", extra={"limit": hard})


class _Daemon:
    def __init__(self, config: NodeConfig, reread: Callable[[], NodeConfig] | None) -> None:
        self._config = config
        self._reread = reread
        self._told_to_stop = False
        self._client = api_client(config)
        self._source = ManifestSource(config.manifests) if config.manifests else None
        self._allocations = AllocationsFile(config.allocations_file if config.manifests else "")
        self._ipvs: IpvsServices | None = None
        self._dataplane = Dataplane(
            config.max_connections,
            masquerade_ports=(config.masquerade_ports.first, config.masquerade_ports.last),
            timeouts=config.timeouts_by_state,
            settings=config.dataplane_settings,
        )
        self._workers = QueueWorkers(
            self._dataplane,
            config.queues.first,
            config.queues.last,
            tunnel_queues=(config.tunnel_queues.first, config.tunnel_queues.last),
            fail_open=config.fail_open,
            gso=config.gso,
            forward_mark=config.forward_mark,
            pass_mark=config.pass_mark,
        )
        self._store = ConnectionStore(self._dataplane, config.state_file, config.state_interval)
        self._peers = sync_daemon(self._dataplane, config)
        self._metrics = Metrics()

    async def main(self) -> None:
        serving = asyncio.create_task(self._serve())

        def stop(number: signal.Signals) -> None:
            log.info("stopping", extra={"signal": number.name})
            self._told_to_stop = True
            notify("STOPPING=1")
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_DFL)
            serving.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        log.info("stopped")

    async def _serve(self) -> None:
        config = self._config
        backend = await asyncio.to_thread(choose_backend, config)
        async with contextlib.AsyncExitStack() as undo:
            watch = undo.enter_context(NetworkWatch())  # before the first look
            addresses = config.addresses or await asyncio.to_thread(discover_addresses)
            if not addresses:
                log.warning(NO_ADDRESSES)
            undo.enter_context(claim_netns())
            undo.callback(self._workers.stop)
            if self._client is not None:
                undo.push_async_callback(self._client.close)
            # Where a crash left rules packets come already, and wait until it is known where to.
            self._workers.bind()
            # When no packet comes any more.
            undo.push_async_callback(self._store.close)
            if self._peers is not None:
                undo.push_async_callback(asyncio.to_thread, self._peers.stop)
            names = self._dns_thread()
            if names is not None:
                undo.push_async_callback(names.close)
            mode = NfqueueMode(self._dataplane, backend, capture_plan(config, addresses))
            if not config.addresses:
                mode.renumber(addresses)  # what is missing may come
            undo.push_async_callback(self._withdraw, mode)
            node = node_context(config, addresses)
            publisher: EventPublisher | None = None
            if self._client is not None:
                publisher = EventPublisher(
                    self._client, config.node_name, lambda key: sync.uid(key)
                )
                undo.push_async_callback(_end, asyncio.create_task(publisher.run()))

            def record(event: Event) -> None:
                _log(event)
                if publisher is not None:
                    publisher.record(event)

            localhost = None
            if config.localhost_node_ports:
                localhost = LocalhostNodePorts(mode, record)
                undo.push_async_callback(localhost.close)
            sync = await undo.enter_async_context(
                Sync(
                    localhost or mode,
                    node,
                    retry=(FIRST_RETRY, config.sync_retry),
                    on_update=self._metrics.observe,
                    # Sync itself logs them, as problems.
                    record=publisher.record if publisher is not None else lambda event: None,
                )
            )
            health = Health(
                lambda: sync.progress,
                lambda: self._ipvs.problem if self._ipvs else "",
                lambda: sync.is_eligible,
            )
            self._metrics.watch(self._dataplane, self._workers, sync, health)
            if names is not None:
                sync.subscribe(names.tell)
                self._metrics.watch_dns(names.server)
            announcing = Announcing(
                config,
                self._client,
                sync,
                lambda: (
                    health.is_serving
                    and health.is_alive
                    and health.node_eligible
                    and not sync.is_excluded
                ),
                record,
            )
            if announcing.announcer is not None:
                self._metrics.watch_announcer(announcing.announcer)
            web = Web(config, health, self._metrics, record)
            undo.push_async_callback(web.close)
            await web.open()
            service_health = ServiceHealth(
                lambda family: sync.node.node_port_addresses_of(family),
                lambda: health.is_alive,
                record,
            )
            undo.push_async_callback(service_health.close)
            if config.ipvs:
                self._ipvs = IpvsServices(mode, self._dataplane)
            ipvs_views = IpvsViews(self._dataplane, self._ipvs)
            undo.push_async_callback(ipvs_views.close)
            handlers = {**self._handlers(sync, announcing), **ipvs_views.handlers()}
            admin = AdminServer(config.admin_path, handlers)
            undo.push_async_callback(admin.close)
            await admin.start()
            if self._source is not None:
                ports = config.service_node_port_range
                allocating = AllocatingSource(
                    self._source,
                    config.service_cidrs,
                    (ports.first, ports.last),
                    self._allocations,
                )
                sync.follow(BalancingSource(allocating, self._allocations))
            if self._client is not None:
                sync.follow(
                    ApiServerSource(
                        self._client,
                        node_name=config.node_name,
                        service_proxy_name=config.service_proxy_name,
                        hidden=config.dns,
                        min_period=config.min_sync_period,
                    )
                )
            if self._source is not None or self._client is not None:
                await sync.ready()
            if self._ipvs is not None:
                await self._ipvs.load(config.ipvs)
            gc.freeze()  # what was loaded stays: looking through it again takes half a second
            await self._store.open()
            self._workers.start()
            if self._peers is not None:
                self._peers.start()
            if names is not None:
                await names.open()
            await asyncio.to_thread(mode.install)
            health.is_serving = True
            await service_health.update(sync.health_checks())
            if localhost is not None:
                localhost.listen()
            notify("READY=1")
            if publisher is not None:
                # As of kube-proxy.
                own = ObjectKey("Node", "", config.node_name)
                publisher.record(Event(own, "Starting", f"svcdp {__version__}", "Normal"))
            log.info(
                "serving",
                extra={
                    "node": config.node_name,
                    "addresses": ",".join(addresses),
                    "queues": f"{config.queues},{config.tunnel_queues}",
                    "rules": backend.name,
                    **sync.counts._asdict(),
                },
            )
            undo.push_async_callback(announcing.close)
            announcing.start()
            telling = _tell(sync, service_health, localhost)
            undo.push_async_callback(_end, asyncio.create_task(telling))
            if not config.addresses:
                following = self._follow_addresses(watch, addresses, sync, mode, health)
                undo.push_async_callback(_end, asyncio.create_task(following))
            await self._attend(sync, mode, health, web)

    def _dns_thread(self) -> DnsThread | None:
        places = [(address, DNS_PORT) for address in self._config.dns_servers]
        # The rules make the addresses local, after the first answer is possible.
        return DnsThread(self._config, places, freebind=True) if places else None

    async def _withdraw(self, mode: NfqueueMode) -> None:
        """Nothing more comes in: stop capturing, then wait until the queues are empty.

        Where rules are to be kept for the next daemon packets wait in the queues instead: a
        connection made after the last save would be unknown to it. What fails leaves no rules.
        """
        if self._config.keep_rules and self._told_to_stop:
            await asyncio.to_thread(self._workers.halt)
            return
        await asyncio.to_thread(mode.close)
        deadline = time.monotonic() + DRAIN_TIME
        while any(stats.waiting for stats in self._workers.stats().values()):
            if time.monotonic() > deadline:
                log.warning("stopping with packets in the queues")
                return
            await asyncio.sleep(DRAIN_STEP)

    async def _attend(self, sync: Sync, mode: NfqueueMode, health: Health, web: Web) -> None:
        """Housekeeping, until cancelled or until a worker dies."""
        watchdog = watchdog_interval()
        generation = sync.generation
        for number in itertools.count(1):
            await asyncio.sleep(min(TICK, watchdog or TICK))
            self._workers.check()
            if self._peers is not None:
                self._peers.check()
            share = -(-self._config.max_connections // SWEEP_ROUNDS)
            await asyncio.to_thread(self._dataplane.sweep, limit=share)
            if number % TRIM_ROUNDS == 0:
                health.rules_error = await _trim(mode)
                await web.open()
            if generation != sync.generation:
                generation = sync.generation
                log.info("in force", extra={"generation": generation, **sync.counts._asdict()})
            if watchdog:
                notify("WATCHDOG=1")

    async def _follow_addresses(
        self,
        watch: NetworkWatch,
        known: tuple[str, ...],
        sync: Sync,
        mode: NfqueueMode,
        health: Health,
    ) -> None:
        """Have node ports, masquerading and routes go by the addresses that the node has."""
        was_read = True
        while True:
            await (watch.wait(TICK) if was_read else asyncio.sleep(TRIM_ROUNDS * TICK))
            was_read = False
            try:
                addresses = await asyncio.to_thread(discover_addresses)
            except Exception:  # no descriptors, or a bug
                log.exception("this node's addresses cannot be read: trying again")
                continue
            was_read = True
            # Also if they are the same: one that went and came took its routes along.
            await asyncio.to_thread(mode.renumber, addresses)
            health.rules_error = await _trim(mode)
            if addresses == known:
                continue
            known = addresses
            log.info("this node's addresses changed", extra={"addresses": ",".join(known)})
            if not known:
                log.warning(NO_ADDRESSES)
            if self._ipvs is None:
                sync.renumber(known)

    def _reload(self) -> None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        if self._source is not None:
            self._source.rescan()
        if self._ipvs is not None:
            self._ipvs.reload(self._config.ipvs)
        if self._reread is not None:
            try:
                fresh = self._reread()
            except SvcdpError as error:
                log.error("the configuration is wrong", extra={"error": str(error)})
            else:
                changed = [
                    setting.key
                    for setting in settings()
                    if getattr(fresh, setting.name) != getattr(self._config, setting.name)
                ]
                if changed:
                    log.warning("settings need a restart", extra={"settings": ",".join(changed)})
        log.info("reloaded")
        notify("READY=1")

    def _handlers(self, sync: Sync, announcing: Announcing) -> dict[str, Handler]:
        def of_dataplane(view: Callable[..., Iterator[views.Item]], *more: object) -> Handler:
            # Looking at all endpoints takes long: the event loop goes on.
            async def handle(request: views.Request) -> Iterator[views.Item]:
                held = await asyncio.to_thread(self._dataplane.services)
                return view(*more, held, request)

            return handle

        return {
            "services": lambda request: (
                views.virtual_services(self._dataplane, request)
                if self._ipvs is not None
                else views.services(sync, request)
            ),
            "endpoints": of_dataplane(views.endpoints),
            "description": of_dataplane(
                functools.partial(views.description, owner=announcing.owner), sync
            ),
            "environment": lambda request: views.environment(sync, request),
            "connections": lambda request: views.connections(self._dataplane, request),
            "explanation": lambda request: views.explanation(self._dataplane, request),
            "pods": lambda request: views.pods(sync, request),
            "pools": lambda request: views.pools(sync, self._client),
            "queues": lambda request: views.queues(self._workers),
            "peers": lambda request: peers(self._peers),
            "status": lambda request: views.status(self._dataplane, sync),
        }


async def _trim(mode: NfqueueMode) -> str:
    """Bring the rules up to date. Returns what is wrong with them: it does not end the daemon."""
    try:
        await asyncio.to_thread(mode.trim)
    except SvcdpError as error:
        log.error("the rules cannot be updated: trying again", extra={"error": str(error)})
        return str(error)
    except Exception as error:  # a bug; the next time may do
        log.exception("the rules cannot be updated: trying again")
        return repr(error)
    return ""


async def _tell(sync: Sync, ports: ServiceHealth, localhost: LocalhostNodePorts | None) -> None:
    """Keep health-check node ports, and node ports at loopback addresses, as the sources say; try
    again those that could not be opened.
    """
    generation = 0
    while True:
        await ports.update(sync.health_checks())
        if localhost is not None:
            localhost.listen()
        await asyncio.sleep(TICK)  # what comes by the way is told at once
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TRIM_ROUNDS * TICK):
                generation = await sync.wait(generation)  # an error: then nothing is alive


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)  # what ended it is in the log


def _log(event: Event) -> None:
    extra = {"object": str(event.regarding), "reason": event.reason}
    log.log(
        logging.WARNING if event.type == "Warning" else logging.INFO, event.message, extra=extra
    )
