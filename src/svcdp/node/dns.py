"""The DNS server beside the daemon: in a thread of its own, told of what is in force.

Questions take Python's time, not the event loop's: however many come, updates of Services and
probes go on, and while many Services change, questions are answered. Packets need neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import signal
import threading
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from svcdp.discovery.dns import DnsServer
from svcdp.discovery.limits import LOCAL_NETWORKS
from svcdp.discovery.names import Names
from svcdp.discovery.resolver import Resolver
from svcdp.discovery.upstream import Forwarder, Upstream
from svcdp.errors import ConfigError, PlatformError
from svcdp.kube import ApiServerSource, ManifestSource, NodeContext
from svcdp.kube.allocations import AllocatingSource
from svcdp.kube.allocationsfile import AllocationsFile
from svcdp.node.config import NodeConfig
from svcdp.node.context import api_client
from svcdp.node.http import HttpServer, Place, Response, routed
from svcdp.node.metrics import CONTENT_TYPE, dns_metrics
from svcdp.sync import ServiceChange, Sync
from svcdp.types import ServiceSpec

__all__ = ["DnsThread", "host_upstreams", "run"]

log = logging.getLogger(__name__)

RESOLV_CONF = "/etc/resolv.conf"

_Result = TypeVar("_Result")


def run(
    config: NodeConfig, listen: Sequence[tuple[str, int]], metrics: Place | None = None
) -> None:
    """Answer questions until SIGTERM or SIGINT, without a dataplane, and tell of them at
    ``metrics``. SIGHUP reads the manifests again. Raises :class:`svcdp.SvcdpError` for what ends
    it.
    """
    if not (config.manifests or config.kubeconfig):
        raise ConfigError("no names: give a folder with -f, or a cluster with --kubeconfig")
    asyncio.run(_run(config, listen, metrics))


async def _run(
    config: NodeConfig, listen: Sequence[tuple[str, int]], metrics: Place | None
) -> None:
    source = ManifestSource(config.manifests) if config.manifests else None
    serving = asyncio.create_task(_serve(config, listen, metrics, source))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    if source is not None:
        loop.add_signal_handler(signal.SIGHUP, source.rescan)
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    log.info("stopped")


async def _serve(
    config: NodeConfig,
    listen: Sequence[tuple[str, int]],
    metrics: Place | None,
    source: ManifestSource | None,
) -> None:
    async with contextlib.AsyncExitStack() as undo:
        client = api_client(config)
        if client is not None:
            undo.push_async_callback(client.close)
        thread = DnsThread(config, listen)
        undo.push_async_callback(thread.close)
        if metrics is not None:
            undo.push_async_callback((await _tell_at(metrics, thread.server)).close)
        sync = await undo.enter_async_context(Sync(_NoProxy(), NodeContext()))
        sync.subscribe(thread.tell)
        if source is not None:
            sync.follow(_completed(source, config))
        if client is not None:
            period = config.min_sync_period
            sync.follow(ApiServerSource(client, hidden=True, min_period=period))
        await sync.ready()
        await thread.open()
        where = ",".join(str(Upstream(*place)) for place in listen)
        log.info("serving", extra={"listen": where, **sync.counts._asdict()})
        await asyncio.Event().wait()


async def _tell_at(place: Place, server: DnsServer) -> HttpServer:
    text = dns_metrics(server)
    web = HttpServer(routed({"/metrics": lambda request: Response(text(), CONTENT_TYPE)}))
    try:
        await web.listen(place)
    except OSError as error:
        message = f"{place[0]}, port {place[1]}: {error.strerror}"
        raise PlatformError(error.errno, message) from None
    return web


def _completed(source: ManifestSource, config: NodeConfig) -> AllocatingSource:
    """Services have the addresses that a node would give them, and its file is the node's: it is
    read, never written.
    """
    remembered = AllocationsFile()
    remembered.services = AllocationsFile(config.allocations_file).services
    ports = config.service_node_port_range
    return AllocatingSource(source, config.service_cidrs, (ports.first, ports.last), remembered)


class _NoProxy:
    """Packets are not served, only names."""

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[tuple[str, int, str]]) -> None:
        """Nothing to do."""


class DnsThread:
    """Runs a :class:`svcdp.discovery.dns.DnsServer` at addresses and ports, by the settings of
    ``config``. ConfigError for a zone that is none.

    With ``freebind`` the addresses need not be this host's yet.
    """

    def __init__(
        self, config: NodeConfig, listen: Sequence[tuple[str, int]], *, freebind: bool = False
    ) -> None:
        self._listen = listen
        self._freebind = freebind
        own = {address for address, _ in listen}
        self._names = Names(config.dns_zone, own)
        upstreams = [Upstream(*each.place) for each in config.dns_upstreams] or host_upstreams(own)
        self.server = DnsServer(
            Resolver(self._names, Forwarder(upstreams)),
            recursion=config.dns_recursion or LOCAL_NETWORKS,
            rate=config.dns_rate,
            log_queries=config.dns_log,
        )
        self._watching: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dns", daemon=True)
        self._thread.start()

    def tell(self, changes: Sequence[ServiceChange]) -> None:
        """For :meth:`svcdp.sync.Sync.subscribe`: names change with the next question."""
        self._loop.call_soon_threadsafe(self._replace, changes)

    async def open(self) -> None:
        """Listen: all that :meth:`tell` was told before is answered. PlatformError."""
        await self._call(self._open())

    async def close(self) -> None:
        """Stop, and end the thread."""
        await self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def _call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _open(self) -> None:
        if not self.server.resolver.forwarder.upstreams:
            log.warning("nobody to ask for names of others: set dnsUpstreams")
        for address, port in self._listen:
            await self.server.open(address, port, freebind=self._freebind)
        self._watching = asyncio.create_task(self.server.resolver.watch())

    async def _close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.server.close()

    def _replace(self, changes: Iterable[ServiceChange]) -> None:
        for change in changes:
            try:
                self._names.replace(*change)
            except Exception:  # a bug; it must not cost other Services their names
                log.exception("names cannot be told", extra={"service": str(change.ref)})


def host_upstreams(own: Iterable[str], file: str = RESOLV_CONF) -> list[Upstream]:
    """The resolvers of this host, without its ``own`` addresses: that would be a circle."""
    try:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    ours = set(map(ipaddress.ip_address, own))
    found = []
    for address in re.findall(r"^[ \t]*nameserver[ \t]+([^\s#;]+)", text, re.M):
        try:
            if ipaddress.ip_address(address) not in ours:
                found.append(Upstream(address))
        except ValueError:  # the C library passes over it, too
            log.warning("no address of a resolver", extra={"file": file, "nameserver": address})
    return found
