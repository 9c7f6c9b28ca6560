"""What probes are told, for each thing that may be wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from probing import Answer, free_port, get
from prometheus_client.parser import text_string_to_metric_families

from svcdp.errors import RulesError
from svcdp.kube.events import Event
from svcdp.node.config import NodeConfig
from svcdp.node.health import TIMEOUT, Health
from svcdp.node.metrics import Metrics
from svcdp.node.values import Bind
from svcdp.node.web import Web
from svcdp.sync import Progress

HOST = "127.0.0.1"
FINE = Progress({}, {}, None, 1000.0, 1001.0, None, None)
LONG = time.monotonic() - TIMEOUT - 1

PROBES = ("livez", "healthz", "readyz")

# What is wrong, and which of the probes fail for it.
WRONG: dict[str, tuple[Callable[[], Progress], dict[str, Any], set[str]]] = {
    "nothing": (lambda: FINE, {}, set()),
    "starting": (lambda: FINE, {"is_serving": False}, {"readyz"}),
    "an update failed": (lambda: replace(FINE, failure=RulesError("no")), {}, set(PROBES)),
    "a change waits": (lambda: replace(FINE, waiting_since=time.monotonic()), {}, set()),
    "a change waits for long": (lambda: replace(FINE, waiting_since=LONG), {}, set(PROBES)),
    "the rules": (lambda: FINE, {"rules_error": "no"}, set(PROBES)),
    "a source": (lambda: replace(FINE, unread_since=time.monotonic()), {}, {"readyz"}),
    "a source, for long": (lambda: replace(FINE, unread_since=LONG), {}, {"readyz"}),
    "the node": (lambda: FINE, {"node_eligible": False}, {"healthz"}),
}


def healthy(progress: Callable[[], Progress] = lambda: FINE, **given: Any) -> Health:
    fields = dict(given)
    eligible = fields.pop("node_eligible", True)
    health = Health(progress, is_eligible=lambda: eligible)
    health.is_serving = True
    for name, value in fields.items():
        setattr(health, name, value)
    return health


def ask(health: Health, *paths: str, metrics: Metrics | None = None) -> list[Answer]:
    """Of the probes' address, or of the other one if a path begins with that word."""
    config = NodeConfig(
        healthz_bind_address=Bind(f"{HOST}:{free_port()}"),
        metrics_bind_address=Bind(f"{HOST}:{free_port()}"),
    )
    places = {"": config.healthz_bind_address.place, "about": config.metrics_bind_address.place}

    events: list[Event] = []

    async def main() -> list[Answer]:
        web = Web(config, health, metrics or Metrics(), events.append)
        await web.open()
        await web.open()
        try:
            answers = []
            for path in paths:
                word, _, rest = path.partition("/")
                place = places[word]
                assert place is not None
                answers.append(await get(place, f"/{rest}"))
            return answers
        finally:
            await web.close()
            assert events == []

    return asyncio.run(main())


@pytest.mark.parametrize("wrong", WRONG)
def test_probes(wrong: str) -> None:
    progress, fields, failing = WRONG[wrong]
    answers = ask(healthy(progress, **fields), *(f"/{probe}" for probe in PROBES), "about/healthz")
    statuses = {probe: answer.status for probe, answer in zip(PROBES, answers, strict=False)}
    assert statuses == {probe: 503 if probe in failing else 200 for probe in PROBES}
    assert answers[3].status == statuses["healthz"]
    live, whole, *_ = answers
    assert live.fields["Content-Type"] == "application/json"
    assert live.json.keys() == {"lastUpdated", "currentTime"}
    assert whole.json.keys() == {"lastUpdated", "currentTime", "nodeEligible"}
    assert whole.json["nodeEligible"] is (wrong != "the node")
    for answer in (live, whole):
        updated = datetime.fromisoformat(answer.json["lastUpdated"]).timestamp()
        if answer.status == 200:
            assert answer.json["lastUpdated"] == answer.json["currentTime"]
        else:
            assert updated == FINE.updated


def test_ready_says_who_is_not() -> None:
    health = healthy(lambda: replace(FINE, unread_since=LONG), rules_error="secret")
    short, long, other = ask(health, "/readyz", "/readyz?x&verbose", "/readyz?verbose=1")
    assert short.body == b"not ready: rules, sources\n"
    assert (
        long.body == b"[+] start\n[+] updates\n[-] rules\n[-] sources\nnot ready: rules, sources\n"
    )
    assert other.body == short.body
    assert ask(healthy(), "/readyz")[0].body == b"ok\n"


def test_lines_that_cannot_be_read_again_are_a_source() -> None:
    health = Health(lambda: FINE, lambda: "rules: line 3: no")
    assert health.readiness()["sources"] is False
    assert all(health.health().values()), "what was served before is"


def test_about_the_daemon() -> None:
    mode, config, metrics, nothing, wrong = ask(
        healthy(), "about/proxyMode", "about/configz", "about/metrics", "about/livez", "/metrics"
    )
    assert (mode.status, mode.body) == (200, b"nfqueue")
    assert mode.fields["Content-Type"].startswith("text/plain")
    settings = config.json["svcdp.io"]
    assert (settings["kind"], settings["queues"], settings["podCIDRs"]) == (
        "NodeConfig",
        "100-103",
        [],
    )
    assert b"kubeproxy_sync_proxy_rules_duration_seconds_count 0.0" in metrics.body
    assert metrics.fields["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert (nothing.status, wrong.status) == (404, 404)


def test_probes_are_counted() -> None:
    metrics = Metrics()
    health = healthy()
    ask(health, "/healthz", "/healthz", "/livez", metrics=metrics)
    ask(healthy(node_eligible=False), "/healthz", "/livez", metrics=metrics)
    text = metrics.text().decode()
    for line in (
        'kubeproxy_proxy_healthz_total{code="200"} 2.0',
        'kubeproxy_proxy_healthz_total{code="503"} 1.0',
        'kubeproxy_proxy_livez_total{code="200"} 2.0',
    ):
        assert line in text


def test_checks_are_counted_by_themselves() -> None:
    health = healthy(rules_error="no", node_eligible=False)
    *_, answer = ask(health, "/livez", "/healthz", "/livez", "/readyz", "about/metrics/slis")
    assert answer.fields["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [
        sample
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    ]
    last = {
        (sample.labels["type"], sample.labels["name"]): sample.value
        for sample in samples
        if sample.name == "kubernetes_healthcheck"
    }
    assert last == {
        ("livez", "updates"): 1,
        ("livez", "rules"): 0,
        ("healthz", "updates"): 1,
        ("healthz", "rules"): 0,
        ("healthz", "node"): 0,
        ("readyz", "start"): 1,
        ("readyz", "updates"): 1,
        ("readyz", "rules"): 0,
        ("readyz", "sources"): 1,
    }
    results = {
        (sample.labels["name"], sample.labels["status"]): sample.value
        for sample in samples
        if sample.name == "kubernetes_healthchecks_total" and sample.labels["type"] == "livez"
    }
    assert results == {("updates", "success"): 2, ("rules", "error"): 2}


def test_an_address_that_is_taken_is_tried_again() -> None:
    events: list[Event] = []
    place = (HOST, free_port())
    config = NodeConfig(
        node_name="n1",
        healthz_bind_address=Bind(f"{HOST}:{place[1]}"),
        metrics_bind_address=Bind(""),
    )

    async def main() -> None:
        one, other = (Web(config, healthy(), Metrics(), events.append) for _ in range(2))
        await one.open()
        await other.open()
        await other.open()
        await one.close()
        await other.open()
        assert (await get(place, "/livez")).status == 200
        await other.close()

    asyncio.run(main())
    (event,) = events
    assert (event.reason, str(event.regarding)) == ("FailedToStartProxierHealthcheck", "Node n1")
    assert event.message.startswith(f"cannot listen at {HOST} port {place[1]}: ")
