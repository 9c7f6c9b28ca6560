"""What the daemon serves by HTTP: probes at one place, metrics at another, as kube-proxy does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus

import msgspec

from svcdp.kube.events import Event, Recorder
from svcdp.kube.model import ObjectKey
from svcdp.node.config import API_VERSION, KIND, NodeConfig
from svcdp.node.health import Health
from svcdp.node.http import HttpServer, Place, Request, Response, report, routed
from svcdp.node.metrics import CONTENT_TYPE, Metrics
from svcdp.node.slis import Slis

__all__ = ["Web"]

MODE = "nfqueue"


class Web:
    """``/healthz /livez /readyz`` at the one address, ``/metrics /metrics/slis /healthz /proxyMode
    /configz`` at the other, as the settings say.
    """

    def __init__(
        self, config: NodeConfig, health: Health, metrics: Metrics, record: Recorder
    ) -> None:
        self._config = config
        self._record = record
        self._health = health
        self._metrics = metrics
        self._slis = Slis()
        probes = {"/healthz": self._healthz, "/livez": self._livez, "/readyz": self._readyz}
        about = {
            "/healthz": self._healthz,
            "/metrics": lambda request: Response(metrics.text(), CONTENT_TYPE),
            "/metrics/slis": lambda request: Response(self._slis.text(), CONTENT_TYPE),
            "/proxyMode": lambda request: Response(MODE.encode()),
            "/configz": self._configz,
        }
        self._servers = [
            (reason, place, HttpServer(routed(routes)))
            for reason, place, routes in (
                ("FailedToStartProxierHealthcheck", config.healthz_bind_address.place, probes),
                ("FailedToStartMetricServer", config.metrics_bind_address.place, about),
            )
            if place is not None
        ]
        self._failed: dict[Place, str] = {}

    async def open(self) -> None:
        """Listen where that is not so yet. What fails is an event, once, and left for the next
        call: packets are served all the same.
        """
        for reason, place, server in self._servers:
            if place in server.places:
                continue
            try:
                await server.listen(place)
            except OSError as error:
                message = f"cannot listen at {place[0]} port {place[1]}: {error.strerror or error}"
                if self._failed.get(place) != message:
                    node = ObjectKey("Node", "", self._config.node_name)
                    self._record(Event(node, reason, message))
                self._failed[place] = message

    async def close(self) -> None:
        """Listen no more."""
        for _, _, server in self._servers:
            await server.close()

    def _healthz(self, request: Request) -> Response:
        checks = self._health.health()
        return self._probe("healthz", checks, nodeEligible=checks["node"])

    def _livez(self, request: Request) -> Response:
        return self._probe("livez", self._health.liveness())

    def _probe(self, name: str, checks: Mapping[str, bool], **more: bool) -> Response:
        self._slis.observe(name, checks)
        passes = all(checks.values())
        now = datetime.now(UTC)
        updated = now if passes else datetime.fromtimestamp(self._health.last_updated, UTC)
        body = {"lastUpdated": _text(updated), "currentTime": _text(now), **more}
        status = HTTPStatus.OK if passes else HTTPStatus.SERVICE_UNAVAILABLE
        self._metrics.probed(name, status)
        return Response(json.dumps(body).encode(), "application/json", status)

    def _readyz(self, request: Request) -> Response:
        checks = self._health.readiness()
        self._slis.observe("readyz", checks)
        return report(checks, request)

    def _configz(self, request: Request) -> Response:
        settings = msgspec.to_builtins(self._config, enc_hook=str)
        whole = {"svcdp.io": {"apiVersion": API_VERSION, "kind": KIND, **settings}}
        return Response(json.dumps(whole).encode(), "application/json")


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
