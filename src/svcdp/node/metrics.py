"""What Prometheus is told: kube-proxy's metrics where they mean the same, and svcdp's own.

Counters of packets are read when they are asked for; nothing is counted twice. No series is one
Service's or one endpoint's: their number follows from the program, not from the cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from svcdp._version import __version__
from svcdp.sync import Sync, Update

if TYPE_CHECKING:
    from svcdp.announce.announcer import Announcer
    from svcdp.dataplane import Dataplane
    from svcdp.discovery.dns import DnsServer
    from svcdp.io.nfqueue import QueueWorkers
    from svcdp.node.health import Health

__all__ = ["CONTENT_TYPE", "Metrics", "dns_metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SYNC_BUCKETS = [0.001 * 2**n for n in range(15)]
PROGRAMMING_BUCKETS = [0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30)]

_QUEUES = {
    "received": ("svcdp_queue_received", "Packets that came through a queue."),
    "dropped_kernel": ("svcdp_queue_dropped", "Packets dropped because the queue was full."),
    "dropped_user": ("svcdp_queue_user_dropped", "Packets that could not be handed over."),
    "truncated": ("svcdp_queue_truncated", "Packets too long for netlink, passed as they were."),
    "answers": ("svcdp_queue_answers", "Resets and ICMP errors sent."),
    "errors": ("svcdp_queue_errors", "Messages, verdicts or answers that failed."),
    "overruns": ("svcdp_enobufs", "Times the receive buffer of a queue was full."),
}


class Metrics:
    """``observe`` and ``probed`` are told of what happens; the rest is read by `text`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._started = clock()
        self._registry = _new_registry()
        self._sync_seconds = Histogram(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Time of an update of what is served, of both IP families.",
            buckets=SYNC_BUCKETS,
            registry=self._registry,
        )
        self._programming_seconds = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "From a change of a Service or its Pods until it is served here.",
            buckets=PROGRAMMING_BUCKETS,
            registry=self._registry,
        )
        self._failures = Counter(
            "svcdp_sync_failures", "Updates that failed.", registry=self._registry
        )
        self._probes = {
            name: Counter(
                f"kubeproxy_proxy_{name}",
                f"Answers of /{name}, by status.",
                ["code"],
                registry=self._registry,
            )
            for name in ("healthz", "livez")
        }

    def watch(
        self, dataplane: Dataplane, workers: QueueWorkers, sync: Sync, health: Health
    ) -> None:
        """Read these when asked."""
        self._registry.register(_State(dataplane, workers, sync, health))

    def watch_dns(self, server: DnsServer) -> None:
        """Read these, too."""
        self._registry.register(_Dns(server))

    def watch_announcer(self, announcer: Announcer) -> None:
        """Read these, too."""
        self._registry.register(_Announced(announcer))

    def observe(self, update: Update) -> None:
        """An update was tried."""
        self._sync_seconds.observe(update.seconds)
        if update.error is not None:
            self._failures.inc()
        for trigger in update.triggers:
            changed = _timestamp(trigger)
            # What changed before is late because of the start.
            if changed is not None and changed >= self._started:
                self._programming_seconds.observe(max(self._clock() - changed, 0))

    def probed(self, name: str, code: int) -> None:
        """``/healthz`` or ``/livez`` was answered."""
        self._probes[name].labels(code=code).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


def dns_metrics(server: DnsServer) -> Callable[[], bytes]:
    """A function that tells of a server without a dataplane, in Prometheus' text format."""
    registry = _new_registry()
    registry.register(_Dns(server))
    return lambda: generate_latest(registry)


def _new_registry() -> CollectorRegistry:
    """Of this process and program."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    build = Gauge("svcdp_build_info", "Constant 1.", ["version"], registry=registry)
    build.labels(version=__version__).set(1)
    return registry


class _State(Collector):
    def __init__(
        self, dataplane: Dataplane, workers: QueueWorkers, sync: Sync, health: Health
    ) -> None:
        self._dataplane = dataplane
        self._workers = workers
        self._sync = sync
        self._health = health

    def collect(self) -> Iterator[Metric]:
        yield from self._of_sync()
        yield from self._of_dataplane()
        yield from self._of_queues()

    def _of_sync(self) -> Iterator[Metric]:
        progress = self._sync.progress
        prefix = "kubeproxy_sync_proxy_rules"
        yield GaugeMetricFamily(
            f"{prefix}_last_timestamp_seconds", "When the last update succeeded.", progress.updated
        )
        yield GaugeMetricFamily(
            f"{prefix}_last_queued_timestamp_seconds", "When the last change came.", progress.queued
        )
        for name, kind in (("endpoint", "EndpointSlice"), ("service", "Service")):
            yield GaugeMetricFamily(
                f"{prefix}_{name}_changes_pending",
                f"Changes of {kind}s that are not served yet.",
                progress.pending.get(kind, 0),
            )
            yield CounterMetricFamily(
                f"{prefix}_{name}_changes",
                f"{kind}s that came, went or became different.",
                progress.changed.get(kind, 0),
            )
        lacking = GaugeMetricFamily(
            f"{prefix}_no_local_endpoints_total",
            "Services whose traffic must stay on this node and finds nobody here.",
            labels=["traffic_policy"],
        )
        for policy, count in zip(
            ("internal", "external"), self._sync.without_local_endpoints(), strict=True
        ):
            lacking.add_metric([policy], count)
        yield lacking
        counts = self._sync.counts
        yield GaugeMetricFamily("svcdp_services", "Services known.", counts.services)
        yield GaugeMetricFamily("svcdp_endpoints", "Endpoints in slices.", counts.endpoints)
        yield GaugeMetricFamily(
            "svcdp_problems",
            "Mistakes in objects, conflicts, failures: see the log.",
            counts.problems,
        )
        yield GaugeMetricFamily(
            "svcdp_state_stale_seconds",
            "For how long a source has not been readable; what was known is served.",
            self._health.stale_seconds,
        )

    def _of_dataplane(self) -> Iterator[Metric]:
        stats = self._dataplane.stats()
        packets = CounterMetricFamily(
            "svcdp_packets", "Packets, by what became of them.", labels=["verdict", "reason"]
        )
        for (verdict, reason), count in stats.packets.items():
            packets.add_metric([verdict.name, reason.name], count)
        yield packets
        yield GaugeMetricFamily(
            "svcdp_connections", "Entries of the connection table.", stats.connections
        )
        yield GaugeMetricFamily("svcdp_connections_max", "Its bound.", stats.connections_max)
        yield GaugeMetricFamily(
            "svcdp_persistence_templates",
            "Those that bind a client to its endpoint.",
            stats.persistence_templates,
        )
        yield CounterMetricFamily(
            "svcdp_connections_created", "Connections made.", stats.connections_created
        )
        yield CounterMetricFamily(
            "svcdp_connections_expired",
            "Connections whose time was over.",
            stats.connections_expired,
        )
        yield CounterMetricFamily(
            "svcdp_scheduler_errors", "Exceptions of schedulers in Python.", stats.scheduler_errors
        )
        yield CounterMetricFamily(
            "svcdp_ejections",
            "Endpoints passed over because they did not answer.",
            stats.ejections,
        )
        yield CounterMetricFamily(
            "svcdp_retries", "SYNs sent again that went to another endpoint.", stats.retries
        )

    def _of_queues(self) -> Iterator[Metric]:
        queues = {str(number): asdict(each) for number, each in self._workers.stats().items()}
        waiting = GaugeMetricFamily("svcdp_queue_waiting", "Packets in a queue.", labels=["queue"])
        for number, stats in queues.items():
            waiting.add_metric([number], stats["waiting"])
        yield waiting
        for field, (name, help_text) in _QUEUES.items():
            family = CounterMetricFamily(name, help_text, labels=["queue"])
            for number, stats in queues.items():
                family.add_metric([number], stats[field])
            yield family


class _Dns(Collector):
    """Of a server in another thread: what it counts is copied before it is read."""

    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server = self._server
        for name, help_text, label, counted in (
            ("queries", "DNS questions, by protocol.", "protocol", server.queries),
            ("responses", "DNS responses, by code.", "code", server.responses),
            ("dropped", "DNS questions without a response, by reason.", "reason", server.dropped),
        ):
            family = CounterMetricFamily(f"svcdp_dns_{name}", help_text, labels=[label])
            for value, count in dict(counted).items():
                family.add_metric([value], count)
            yield family
        upstreams = CounterMetricFamily(
            "svcdp_dns_upstream_queries",
            "DNS questions to upstreams, by what became of them.",
            labels=["upstream", "result"],
        )
        for (upstream, result), count in dict(server.resolver.forwarder.results).items():
            upstreams.add_metric([str(upstream), result], count)
        yield upstreams
        cache = server.resolver.cache
        yield CounterMetricFamily(
            "svcdp_dns_cache_hits", "Answers of upstreams reused.", cache.hits
        )
        yield GaugeMetricFamily("svcdp_dns_cache_entries", "Answers held.", len(cache))


class _Announced(Collector):
    def __init__(self, announcer: Announcer) -> None:
        self._announcer = announcer

    def collect(self) -> Iterator[Metric]:
        announcer = self._announcer
        yield GaugeMetricFamily(
            "svcdp_announced_addresses",
            "Load-balancer addresses that this node answers for.",
            len(announcer.owned),
        )
        yield GaugeMetricFamily(
            "svcdp_announce_members",
            "Nodes that share these addresses; 0: this one must have none.",
            len(announcer.members.alive()),
        )
        yield CounterMetricFamily(
            "svcdp_announce_answers", "Answers by ARP and NDP.", announcer.counted.answers
        )
        yield CounterMetricFamily(
            "svcdp_announce_sent",
            "Announcements of addresses that came here.",
            announcer.counted.announcements,
        )


def _timestamp(text: str) -> float | None:
    """Of RFC 3339 text, in seconds since 1970. None: it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.timestamp() if found.tzinfo else None
