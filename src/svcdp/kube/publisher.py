"""Events to an API server, as ``events.k8s.io/v1`` has them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from svcdp.kube.events import Event
from svcdp.kube.model import ObjectKey
from svcdp.kube.reflector import ApiError

__all__ = ["EventPublisher", "Writes", "micro_time"]

log = logging.getLogger(__name__)

CONTROLLER = "svcdp.io/svcdp"
BURST = 25  # requests at once
PERIOD = 1.0  # seconds between two requests later
WAITING_MAX = 1000  # events that wait; more are dropped
KNOWN_MAX = 1000  # events that go on as a series when they come again
NOTE_MAX = 1024  # bytes; the API's
NAME_MAX = 200  # of an object's name within that of its event
#: Of what events are about: its API's version, and what svcdp does with it.
KINDS = {
    "Service": ("v1", "ServeService"),
    "Node": ("v1", "ServeNode"),
    "LoadBalancerPool": ("svcdp.io/v1alpha1", "GiveAddresses"),
}
PASSING = (0, 401, 408, 409, 429)  # what a later try may change, and all from 500 on


class Writes(Protocol):
    """What is asked of :class:`svcdp.kube.client.Client`."""

    async def post(self, path: str, body: bytes) -> bytes: ...

    async def patch(self, path: str, body: bytes) -> bytes: ...


@dataclass(slots=True)
class _Published:
    """Where an event is, and how often it was seen."""

    path: str
    count: int = 1


class EventPublisher:
    """Has events in the API server, in the background: :meth:`record` returns at once.

    An event that comes again is not made again: it becomes a series that counts. ``uid_of`` knows
    an object's uid ("": not known), by which kubectl finds its events. ``node_name`` is who
    reports. ``burst`` requests go at once, then one each ``period`` seconds; ``retry`` as for
    reflectors. For the event loop's thread.
    """

    def __init__(
        self,
        client: Writes,
        node_name: str,
        uid_of: Callable[[ObjectKey], str] = lambda key: "",
        *,
        burst: int = BURST,
        period: float = PERIOD,
        retry: tuple[float, float] = (0.5, 30.0),
    ) -> None:
        self._client = client
        self._node_name = node_name
        self._uid_of = uid_of
        self._burst = burst
        self._period = period
        self._retry = retry
        self._waiting: dict[Event, int] = {}  # how often each came
        self._known: OrderedDict[Event, _Published] = OrderedDict()
        self._wake = asyncio.Event()
        self._is_full = self._is_refused = False

    def record(self, event: Event) -> None:
        """Take an event. Never blocks, never raises; too many are dropped, which is logged."""
        if event not in self._waiting and len(self._waiting) >= WAITING_MAX:
            if not self._is_full:
                log.warning("too many events: some are not published", extra={"max": WAITING_MAX})
            self._is_full = True
            return
        self._waiting[event] = self._waiting.get(event, 0) + 1
        self._wake.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        loop = asyncio.get_running_loop()
        first, longest = self._retry
        pause = first
        free_at = loop.time() - self._burst * self._period  # a bucket of tokens, as a time
        while True:
            if not self._waiting:
                self._is_full = False
                self._wake.clear()
                await self._wake.wait()
            free_at = max(free_at, loop.time() - self._burst * self._period) + self._period
            await asyncio.sleep(max(0.0, free_at - loop.time()))
            event = next(iter(self._waiting))
            count = self._waiting.pop(event)
            try:
                await self._publish(event, count)
                self._is_refused = False
                pause = first
            except ApiError as error:
                if error.status in PASSING or error.status >= 500:
                    self._waiting = {event: count + self._waiting.pop(event, 0), **self._waiting}
                    await asyncio.sleep(max(error.retry_after, pause))
                    pause = min(pause * 2, longest)
                else:
                    self._refused(error)
            except Exception:  # a bug; the others must go on
                log.exception("an event is lost")

    def _refused(self, error: ApiError) -> None:
        """Said once: the events themselves are in the log too."""
        if not self._is_refused:
            grant = "grant the verbs create and patch on events.events.k8s.io"
            hint = f" ({grant})" if error.status == 403 else ""
            log.warning("cannot publish events: %s%s", error, hint)
        self._is_refused = True

    async def _publish(self, event: Event, count: int) -> None:
        known = self._known.get(event)
        if known is not None and await self._add(known, count):
            self._known.move_to_end(event)
            return
        body = self._body(event)
        path = f"/apis/events.k8s.io/v1/namespaces/{body['metadata']['namespace']}/events"
        await self._client.post(path, msgspec.json.encode(body))
        self._known[event] = _Published(f"{path}/{body['metadata']['name']}")
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        if count > 1:  # the rest is a request of its own, which may fail by itself
            self._waiting[event] = self._waiting.get(event, 0) + count - 1

    async def _add(self, known: _Published, count: int) -> bool:
        """It came again. False: the server has forgotten it, as it does after an hour."""
        series = {"count": known.count + count, "lastObservedTime": micro_time()}
        try:
            await self._client.patch(known.path, msgspec.json.encode({"series": series}))
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        known.count += count
        return True

    def _body(self, event: Event) -> dict[str, Any]:
        kind, namespace, name = event.regarding
        version, action = KINDS[kind]
        regarding = {"apiVersion": version, "kind": kind, "namespace": namespace, "name": name}
        if uid := self._uid_of(event.regarding):
            regarding["uid"] = uid
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{name[:NAME_MAX].rstrip('.-')}.{secrets.token_hex(8)}",
                "namespace": namespace or "default",
            },
            "eventTime": micro_time(),
            "type": event.type,
            "reason": event.reason,
            "action": action,
            "note": event.message.encode()[:NOTE_MAX].decode(errors="ignore"),
            "regarding": regarding,
            "reportingController": CONTROLLER,
            "reportingInstance": f"svcdp-{self._node_name}"[:128],
        }


def micro_time() -> str:
    """Now, as the API's MicroTime."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
