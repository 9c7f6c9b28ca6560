"""What Prometheus reads, as its own parser does."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench import Bench
from prometheus_client.parser import text_string_to_metric_families

from svcdp._version import __version__
from svcdp.announce.link import Counted
from svcdp.announce.members import FixedMembers
from svcdp.discovery.cache import Cache
from svcdp.discovery.upstream import Upstream
from svcdp.errors import RulesError
from svcdp.io.nfqueue import QueueStats
from svcdp.node.health import Health
from svcdp.node.metrics import Metrics
from svcdp.sync import Counts, Progress, Update

PROGRESS = Progress(
    {"Service": 7, "EndpointSlice": 9}, {"EndpointSlice": 2}, None, 1000.5, 1001.5, None, None
)


def families(metrics: Metrics) -> dict[str, Any]:
    return {f.name: f for f in text_string_to_metric_families(metrics.text().decode())}


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and the values of labels, in the order of their names."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families(metrics).values()
        for sample in family.samples
    }


@pytest.fixture
def watching() -> Metrics:
    bench = Bench()
    bench.serve(("10.1.0.1", 80))
    bench.send(port=1)
    bench.send(port=1)
    bench.send(to=("192.0.2.99", 1))
    workers = SimpleNamespace(
        stats=lambda: {
            100: QueueStats(9, 8, 1, 0, 2, 3, 4, 5, 6, 7),
            104: QueueStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        }
    )
    sync: Any = SimpleNamespace(
        progress=PROGRESS,
        counts=Counts(services=3, slices=4, endpoints=50, specs=3, problems=1),
        without_local_endpoints=lambda: (1, 2),
    )
    metrics = Metrics()
    metrics.watch(bench.dp, workers, sync, Health(lambda: PROGRESS))  # type: ignore[arg-type]
    announcer: Any = SimpleNamespace(
        owned={"192.0.2.80"},
        members=FixedMembers(["n1", "n2"], lambda: True),
        counted=Counted(answers=3, announcements=2),
    )
    metrics.watch_announcer(announcer)
    forwarder = SimpleNamespace(results={(Upstream("192.0.2.53"), "answered"): 3})
    server: Any = SimpleNamespace(
        queries={"udp": 5},
        responses={"NOERROR": 4},
        dropped={"limited": 1},
        resolver=SimpleNamespace(forwarder=forwarder, cache=Cache()),
    )
    metrics.watch_dns(server)
    return metrics


def test_what_is_read_when_asked(watching: Metrics) -> None:
    found = samples(watching)
    prefix = "kubeproxy_sync_proxy_rules"
    expected = {
        (f"{prefix}_last_timestamp_seconds", ()): 1001.5,
        (f"{prefix}_last_queued_timestamp_seconds", ()): 1000.5,
        (f"{prefix}_endpoint_changes_pending", ()): 2,
        (f"{prefix}_service_changes_pending", ()): 0,
        (f"{prefix}_endpoint_changes_total", ()): 9,
        (f"{prefix}_service_changes_total", ()): 7,
        (f"{prefix}_no_local_endpoints_total", ("internal",)): 1,
        (f"{prefix}_no_local_endpoints_total", ("external",)): 2,
        ("svcdp_build_info", (__version__,)): 1,
        ("svcdp_services", ()): 3,
        ("svcdp_endpoints", ()): 50,
        ("svcdp_problems", ()): 1,
        ("svcdp_state_stale_seconds", ()): 0,
        ("svcdp_packets_total", ("NEW", "FORWARD")): 1,
        ("svcdp_packets_total", ("ESTABLISHED", "FORWARD")): 1,
        ("svcdp_connections", ()): 1,
        ("svcdp_connections_created_total", ()): 1,
        ("svcdp_queue_received_total", ("100",)): 9,
        ("svcdp_queue_dropped_total", ("100",)): 5,
        ("svcdp_queue_user_dropped_total", ("100",)): 6,
        ("svcdp_queue_waiting", ("100",)): 7,
        ("svcdp_queue_waiting", ("104",)): 0,
        ("svcdp_enobufs_total", ("100",)): 4,
        ("svcdp_announced_addresses", ()): 1,
        ("svcdp_announce_members", ()): 2,
        ("svcdp_announce_answers_total", ()): 3,
        ("svcdp_announce_sent_total", ()): 2,
        ("process_open_fds", ()): found["process_open_fds", ()],
    }
    assert {name: found.get(name) for name in expected} == expected
    passed = [value for (name, labels), value in found.items() if labels[1:] == ("PASS",)]
    assert sum(passed) == 1


def test_each_has_a_type_and_words(watching: Metrics) -> None:
    ours = {n: f for n, f in families(watching).items() if n.startswith(("svcdp_", "kubeproxy_"))}
    assert all(family.documentation and family.type != "unknown" for family in ours.values())
    histograms = {name for name, family in ours.items() if family.type == "histogram"}
    assert histograms == {
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_network_programming_duration_seconds",
    }
    names = {sample.name for family in ours.values() for sample in family.samples}
    assert not any(name.endswith("_created") for name in names)


def test_the_reference_lists_them(watching: Metrics) -> None:
    text = (Path(__file__).parents[3] / "docs" / "reference.md").read_text()
    text, _, _ = text.partition("\n`svcdp controller` has")
    listed = re.findall(r"^\| `((?:kubeproxy|svcdp)_\w+)` \| (\w+) \|", text, re.M)
    ours = {
        name + "_total" * (family.type == "counter"): family.type
        for name, family in families(watching).items()
        if name.startswith(("svcdp_", "kubeproxy_"))
    }
    assert dict(listed) == ours
    assert len(listed) == len(ours)


def test_updates_are_timed() -> None:
    metrics = Metrics()
    metrics.observe(Update(0.003, None))
    metrics.observe(Update(100.0, RulesError("no")))
    found = samples(metrics)
    name = "kubeproxy_sync_proxy_rules_duration_seconds"
    bounds = [labels[0] for sample, labels in found if sample == f"{name}_bucket"]
    assert bounds == [str(0.001 * 2**n) for n in range(15)] + ["+Inf"]
    assert [found[f"{name}_bucket", (bound,)] for bound in bounds] == [0, 0] + [1] * 13 + [2]
    assert found[f"{name}_sum", ()] == pytest.approx(100.003)
    assert found["svcdp_sync_failures_total", ()] == 1


def test_how_long_changes_take_to_be_served() -> None:
    now = 1_800_000_000.0  # 2027-01-15T08:00:00Z
    metrics = Metrics(clock=lambda: now)
    now += 10
    triggers = (
        "2027-01-15T08:00:07.5Z",  # 2.5 s ago
        "2027-01-15T08:00:04.999999999Z",
        "2027-01-15T09:00:08+01:00",
        "2027-01-15T08:00:12Z",  # by a clock that is ahead: 0
        "2027-01-15T07:59:59Z",  # before the start
        "2027-01-15T08:00:05",  # of which zone?
        "yesterday",
    )
    metrics.observe(Update(0.1, None, triggers))
    found = samples(metrics)
    name = "kubeproxy_network_programming_duration_seconds"
    assert found[f"{name}_count", ()] == 4
    assert found[f"{name}_sum", ()] == pytest.approx(2.5 + 5 + 2)
    bounds = [labels[0] for sample, labels in found if sample == f"{name}_bucket"]
    assert (len(bounds), bounds[:3], bounds[-2:]) == (81, ["0.25", "0.5", "1.0"], ["300.0", "+Inf"])
