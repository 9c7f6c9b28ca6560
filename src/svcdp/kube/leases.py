"""Leases of ``coordination.k8s.io/v1``: who of several does something, and who is alive.

As client-go's leaderelection has it: another's lease has expired when it was not seen to change
for as long as it says, by this machine's own monotonic clock. Clocks of machines are not compared;
what a Lease says of times is for people.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from svcdp.errors import ManifestError
from svcdp.kube.publisher import Writes, micro_time
from svcdp.kube.reflector import ABSENT, CONFLICT, ApiError, Resource

__all__ = [
    "Lease",
    "LeaseClient",
    "LeaseRecord",
    "LeaseSpec",
    "Observation",
    "boot_time",
    "decode_lease",
    "lease_resource",
]

_API = "/apis/coordination.k8s.io/v1"
_RESOURCE = "leases.coordination.k8s.io"


def boot_time() -> float:
    """Seconds that go on while the machine sleeps: others do not wait for it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseSpec(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """``lease_duration_seconds`` is counted from when it was last renewed."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class _Meta(msgspec.Struct, frozen=True, rename="camel", gc=False):
    name: str
    resource_version: str
    namespace: str = ""
    labels: dict[str, str] | None = None


class LeaseRecord(msgspec.Struct, frozen=True, gc=False):
    """A Lease, as the API server has it."""

    metadata: _Meta
    spec: LeaseSpec = LeaseSpec()


def decode_lease(data: bytes) -> LeaseRecord:
    """ManifestError for what is none."""
    try:
        return msgspec.json.decode(data, type=LeaseRecord)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestError(f"not a Lease: {error}") from None


def lease_resource(namespace: str, labels: str = "") -> Resource[LeaseRecord]:
    """The Leases of a namespace, for a :class:`svcdp.kube.reflector.Reflector`. ``labels`` is a
    selector, as the API has it.
    """
    selectors = {"labelSelector": labels} if labels else {}
    return Resource(_RESOURCE, "Lease", _path(namespace), decode_lease, selectors)


class Observation:
    """A Lease as it is seen from here, over time: who holds it, and until when if nothing more is
    heard. Times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._spec = LeaseSpec()
        self._since = 0.0

    def see(self, spec: LeaseSpec, now: float) -> None:
        """``now``: after it was read. A Lease that did not change grows no younger."""
        if spec != self._spec:
            self._spec, self._since = spec, now

    @property
    def duration(self) -> int:
        """Seconds for which it is held without being renewed."""
        return self._spec.lease_duration_seconds or 0

    @property
    def ends(self) -> float:
        """When it expires, if it does not change before."""
        return self._since + self.duration

    def holder(self, now: float) -> str:
        """Who has it at ``now``; "": nobody."""
        return (self._spec.holder_identity or "") if now < self.ends else ""


class LeaseClient(Writes, Protocol):
    """What is asked of :class:`svcdp.kube.client.Client`."""

    url: str

    async def get(self, path: str, params: Mapping[str, str]) -> bytes: ...


class Lease:
    """One Lease, and this process as ``identity``, which no other process may be. Who holds it
    renews it by calling :meth:`acquire` well within ``duration`` (whole seconds).

    ``labels`` are those that it has at least. ``clock`` counts seconds and never goes back.
    For one event loop; one call at a time.
    """

    def __init__(
        self,
        client: LeaseClient,
        namespace: str,
        name: str,
        identity: str,
        duration: int,
        labels: Mapping[str, str] | None = None,
        *,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        if duration < 1 or not identity:
            raise ValueError("a Lease has a duration of a second or more, and an identity")
        self.name = name
        self.identity = identity
        self.duration = duration
        self._client = client
        self._folder = _path(namespace)
        self._path = f"{self._folder}/{quote(name)}"
        self._labels = dict(labels or {})
        self._clock = clock
        self._seen = Observation()
        self._own: LeaseRecord | None = None  # as this process wrote it last
        self._ends = float("-inf")  # this process's hold

    @property
    def is_held(self) -> bool:
        """Whether this process holds it now: until ``duration`` after it began to renew it, which
        is before anybody else takes it for expired.
        """
        return self.remaining > 0

    @property
    def remaining(self) -> float:
        """For how many seconds more :attr:`is_held`, if it is not renewed."""
        return max(0.0, self._ends - self._clock())

    @property
    def holder(self) -> str:
        """Who held it by the last look; "": nobody."""
        return self._seen.holder(self._clock())

    @property
    def renew_time(self) -> str:
        """What this process's last write says, which no other one does; "": it holds nothing."""
        return (self._own and self._own.spec.renew_time) or ""

    async def acquire(self) -> bool:
        """Take it if it is free or expired, renew it if it is held; returns :attr:`is_held`.

        Raises ApiError: it may be held all the same, as long as it lasts.
        """
        if self._own is not None and await self._write(self._own):
            return self.is_held
        found = await self._look()
        if found is None:
            await self._create()
        elif self.holder in ("", self.identity):
            await self._write(found)
        else:
            self._lose()
        return self.is_held

    async def release(self) -> None:
        """Leave it to others at once, if it is held. Raises ApiError."""
        self._lose()
        found = await self._look()
        if found is None or found.spec.holder_identity != self.identity:
            return
        # As client-go does it. A second, since none is not allowed.
        spec = {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": micro_time()}
        await self._patch(found, {"spec": spec})

    def _lose(self) -> None:
        self._own = None
        self._ends = float("-inf")

    async def _look(self) -> LeaseRecord | None:
        """As it is now; None: there is none."""
        try:
            found = self._decode(await self._client.get(self._path, {}))
        except ApiError as error:
            if error.status != ABSENT:
                raise self._explained("get", error) from error
            self._lose()
            return None
        self._seen.see(found.spec, self._clock())
        return found

    async def _create(self) -> None:
        started, now = self._clock(), micro_time()
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.name, "labels": self._labels},
            "spec": {**self._hold(now), "acquireTime": now, "leaseTransitions": 0},
        }
        try:
            made = await self._client.post(self._folder, msgspec.json.encode(body))
        except ApiError as error:
            if error.status != CONFLICT:  # else another was quicker
                raise self._explained("create", error) from error
            return
        self._take(self._decode(made), started)

    async def _write(self, found: LeaseRecord) -> bool:
        """Have it, if it is still as it was found."""
        started, now = self._clock(), micro_time()
        spec = self._hold(now)
        if found.spec.holder_identity != self.identity:
            transitions = (found.spec.lease_transitions or 0) + 1
            spec |= {"acquireTime": now, "leaseTransitions": transitions}
        body: dict[str, Any] = {"metadata": {"labels": self._labels}, "spec": spec}
        patched = await self._patch(found, body)
        if patched is None:
            self._own = None
            return False
        self._take(patched, started)
        return True

    async def _patch(self, found: LeaseRecord, body: dict[str, Any]) -> LeaseRecord | None:
        """None: it is no longer as it was found."""
        metadata = {**body.get("metadata", {}), "resourceVersion": found.metadata.resource_version}
        data = msgspec.json.encode({**body, "metadata": metadata})
        try:
            return self._decode(await self._client.patch(self._path, data))
        except ApiError as error:
            if error.status not in (CONFLICT, ABSENT):
                raise self._explained("patch", error) from error
            return None

    def _take(self, written: LeaseRecord, started: float) -> None:
        self._own = written
        self._seen.see(written.spec, self._clock())
        self._ends = started + self.duration

    def _hold(self, now: str) -> dict[str, Any]:
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self.duration,
            "renewTime": now,
        }

    def _decode(self, data: bytes) -> LeaseRecord:
        try:
            return decode_lease(data)
        except ManifestError as error:
            raise ApiError(f"{self._client.url}: this is no API server's answer: {error}") from None

    def _explained(self, verb: str, error: ApiError) -> ApiError:
        text = f"cannot {verb} the Lease {self.name}: {error}"
        if error.status == 403:
            text += f" (grant the verbs get, create and patch on {_RESOURCE})"
        return ApiError(text, status=error.status, retry_after=error.retry_after)


def _path(namespace: str) -> str:
    return f"{_API}/namespaces/{quote(namespace)}/leases"
