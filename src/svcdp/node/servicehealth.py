"""Health-check node ports: load balancers ask each node whether it has endpoints of a Service."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus

from svcdp.kube.events import Event, Recorder
from svcdp.kube.health import HealthCheck
from svcdp.kube.model import IPFamily, ObjectKey
from svcdp.node.http import HttpServer, Place, Request, Response

__all__ = ["ServiceHealth"]

log = logging.getLogger(__name__)

FAILED = "FailedToStartServiceHealthcheck"


class ServiceHealth:
    """Answers at each Service's ``healthCheckNodePort``, at ``addresses`` of its IP family.

    200 while endpoints on this node are ready and ``is_alive`` says so of the proxy; else 503.
    """

    def __init__(
        self,
        addresses: Callable[[IPFamily], Iterable[str]],
        is_alive: Callable[[], bool],
        record: Recorder,
    ) -> None:
        self._addresses = addresses
        self._is_alive = is_alive
        self._record = record
        self._server = HttpServer(self._answer)
        self._checks: dict[Place, HealthCheck] = {}
        self._failed: dict[ObjectKey, str] = {}

    async def update(self, checks: Iterable[HealthCheck]) -> None:
        """Answer for these, and no others. A port that cannot be opened is an event, once, and
        tried again by the next call. Raises nothing.
        """
        try:
            await self._update(checks)
        except Exception:  # a bug; until the next call nobody knows
            log.exception("health-check node ports answer 503: trying again")
            self._checks = {}

    async def _update(self, checks: Iterable[HealthCheck]) -> None:
        failed: dict[ObjectKey, str] = {}
        wanted: dict[Place, HealthCheck] = {}
        for check in checks:
            for address in self._addresses(check.family):
                holder = wanted.setdefault((address, check.port), check)
                if holder is not check:
                    failed[_key(check)] = _failure(check, f"Service {holder.service} has it")
        self._checks = wanted
        for place in self._server.places - wanted.keys():
            self._server.leave(place)
        for place in wanted.keys() - self._server.places:
            try:
                await self._server.listen(place)
            except OSError as error:
                check = wanted[place]
                failed[_key(check)] = _failure(check, f"{place[0]}: {error.strerror or error}")
        for key, message in failed.items():
            if self._failed.get(key) != message:
                self._record(Event(key, FAILED, message))
        self._failed = failed

    async def close(self) -> None:
        """Answer no more."""
        await self._server.close()

    def _answer(self, request: Request) -> Response:
        check = self._checks.get(request.place)
        if check is None:  # it has just gone, or is not known
            return Response(b"", status=HTTPStatus.SERVICE_UNAVAILABLE)
        is_alive = self._is_alive()
        body = {
            "service": {"namespace": check.service.namespace, "name": check.service.name},
            "localEndpoints": check.endpoints,
            "serviceProxyHealthy": is_alive,
        }
        return Response(
            json.dumps(body).encode(),
            "application/json",
            HTTPStatus.OK if is_alive and check.endpoints else HTTPStatus.SERVICE_UNAVAILABLE,
            {"X-Load-Balancing-Endpoint-Weight": str(check.endpoints)},
        )


def _key(check: HealthCheck) -> ObjectKey:
    return ObjectKey("Service", *check.service)


def _failure(check: HealthCheck, why: str) -> str:
    return f"health-check node port {check.port} cannot be opened: {why}"
