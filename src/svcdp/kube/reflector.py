"""Follows one kind of object at an API server: a list, then what changes, for ever.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Generic, NamedTuple, Protocol, TypeVar

import msgspec

from svcdp.errors import ManifestError, SourceError, SvcdpError
from svcdp.kube.model import ObjectKey

__all__ = ["ApiError", "Reflector", "Requests", "Resource"]

PAGE = 500  # objects of a page of a list, as kubectl and client-go have it
WATCH_TIME = (300, 600)  # seconds after which the server ends a watch; spreads the load
SILENCE = 90.0  # seconds without a byte of a watch; bookmarks come once a minute
SHORT = 1.0  # seconds; a watch that ends sooner, without a word, did not work (client-go's)
MUTE_WATCHES = 3  # that end so, or by silence, in a row: they do not work, as behind some proxies
GONE = 410
FORBIDDEN, ABSENT, CONFLICT = 403, 404, 409
ABSENT_RETRY = 300.0  # seconds until it is asked again for what it does not know: it was upgraded

Record = TypeVar("Record")
_Anything = TypeVar("_Anything")


class ApiError(SourceError):
    """An API server refused or could not be reached. ``status`` is HTTP's, 0: no answer."""

    def __init__(self, message: str, *, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Requests(Protocol):
    """What a reflector asks of :class:`svcdp.kube.client.Client`."""

    url: str

    async def get(self, path: str, params: Mapping[str, str]) -> bytes: ...

    def watch(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncGenerator[bytes, None]: ...


class Resource(NamedTuple, Generic[Record]):
    """A kind, as the API has it. ``decode`` raises ManifestError. Of an ``optional`` one there may
    be none: an old server does not know it, or one does not tell.
    """

    name: str
    kind: str
    path: str
    decode: Callable[[bytes], Record]
    selectors: Mapping[str, str] = {}
    optional: bool = False


class _Named(msgspec.Struct, gc=False):
    name: str
    namespace: str = ""
    resource_version: str = msgspec.field(name="resourceVersion", default="")


class _Head(msgspec.Struct, gc=False):
    """What every object has."""

    metadata: _Named


class _ListMeta(msgspec.Struct):
    resource_version: str = msgspec.field(name="resourceVersion", default="")
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    """What an ERROR event holds."""

    code: int = 0
    message: str = ""


class Reflector(Generic[Record]):
    """Tells ``take`` of objects by key, as they are now; None: it is gone.

    What comes in one call was true at one time. Errors do not end it: it tries again, after
    ``retry`` seconds (the first wait and the longest, each time up to half less), from where
    it was. ``tell`` is called when :attr:`errors` or :attr:`listed` changed.
    """

    def __init__(
        self,
        client: Requests,
        resource: Resource[Record],
        take: Callable[[Mapping[ObjectKey, Record | None]], None],
        tell: Callable[[], None],
        *,
        retry: tuple[float, float] = (0.5, 30.0),
        silence: float = SILENCE,
        page: int = PAGE,
    ) -> None:
        self._client = client
        self._resource = resource
        self._take = take
        self._tell = tell
        self._retry = retry
        self._silence = silence
        self._page = page
        self._version = ""  # of what was taken; "": list first
        self._known: set[ObjectKey] = set()
        self._bad: dict[ObjectKey, ManifestError] = {}
        self._lost: SvcdpError | None = None
        self._mute_watches = 0  # in a row
        self._mute: SourceError | None = None
        self._progress = False
        #: Whether all objects have been listed once.
        self.listed = False

    @property
    def errors(self) -> tuple[SvcdpError, ...]:
        """What is wrong now. An object that cannot be read counts as it was before."""
        bad = (self._bad[key] for key in sorted(self._bad))
        return (*bad, *filter(None, (self._lost, self._mute)))

    async def run(self) -> None:
        """Until cancelled."""
        pause, longest = self._retry
        while True:
            self._progress = False
            wait = 0.0
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except ApiError as error:
                if _is_gone(error):
                    self._version = ""
                elif self._resource.optional and error.status in (FORBIDDEN, ABSENT):
                    self._do_without(error)
                    wait = ABSENT_RETRY if error.status == ABSENT else 0.0
                else:
                    self._fail(error)
                    wait = error.retry_after
            if self._progress:
                pause = self._retry[0]
            if wait or not self._progress:
                # Many nodes lose the same server at once; they must not come back so.
                await asyncio.sleep(max(wait, pause * random.uniform(0.5, 1.0)))
                pause = min(pause * 2, longest)

    async def _list(self) -> None:
        """All objects, in pages of one version: the newest, whatever server is asked."""
        params = {**self._resource.selectors, "limit": str(self._page)}
        items: list[msgspec.Raw] = []
        while True:
            try:
                page = self._decode(await self._get(params), _List)
            except ApiError as error:
                if error.status != GONE or "limit" not in params:
                    raise
                # Reading the pages took longer than etcd keeps a version: all at once, then.
                params = dict(self._resource.selectors)
                items = []
                continue
            items += page.items or ()
            if not page.metadata.continue_:
                break
            params["continue"] = page.metadata.continue_
        self._replace(items, page.metadata.resource_version)

    async def _get(self, params: Mapping[str, str]) -> bytes:
        try:
            return await self._client.get(self._resource.path, params)
        except ApiError as error:
            raise self._explained("list", error) from error

    async def _watch(self) -> None:
        """From the version on, until the server ends it."""
        params = {
            **self._resource.selectors,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(*WATCH_TIME)),
        }
        lines = self._client.watch(self._resource.path, params, self._silence)
        granted = time.monotonic()
        async with aclosing(lines):
            try:
                async for line in lines:
                    if line:
                        self._event(self._decode(line, _Event))
                        self._watched()
                    else:
                        granted = time.monotonic()
                        self._recover()
            except ApiError as error:
                raise self._explained("watch", error) from error
        if SHORT <= time.monotonic() - granted < self._silence:
            self._watched()  # nothing happened, and a balancer in between got tired of it
        elif not self._progress:
            self._watched_in_vain()

    def _watched(self) -> None:
        self._progress = True
        self._mute_watches = 0
        if self._mute is not None:
            self._mute = None
            self._tell()

    def _watched_in_vain(self) -> None:
        """Without a word. After some, list instead, which is slower: changes must come somehow."""
        self._mute_watches += 1
        if self._mute_watches < MUTE_WATCHES:
            return
        self._version = ""
        if self._mute is None:
            name = self._resource.name
            self._mute = SourceError(
                f"{self._client.url}: watches of {name} end without a word:"
                " changes come late, by lists"
            )
            self._tell()

    def _event(self, event: _Event) -> None:
        if event.type == "ERROR":
            # Of whatever kind: the same watch would come to the same (client-go lists, too).
            self._version = ""
            status = self._decode(event.object, _Status)
            raise ApiError(f"{self._client.url}: {status.message}", status=status.code)
        metadata = self._decode(event.object, _Head).metadata
        if event.type in ("ADDED", "MODIFIED", "DELETED"):
            key = self._key(metadata)
            if event.type == "DELETED":
                self._known.discard(key)
                if self._bad.pop(key, None):
                    self._tell()
                self._take({key: None})
            else:
                self._take(self._read([(key, event.object)]))
        if metadata.resource_version:
            self._version = metadata.resource_version

    def _replace(self, items: Iterable[msgspec.Raw], version: str) -> None:
        """These are all objects."""
        found = [(self._key(self._decode(item, _Head).metadata), item) for item in items]
        gone = self._known - {key for key, _ in found}
        self._known -= gone
        self._bad.clear()
        changed: dict[ObjectKey, Record | None] = dict.fromkeys(gone)
        changed.update(self._read(found))
        self._take(changed)
        self._version = version
        self._lost = None
        self.listed = True
        self._tell()

    def _read(
        self, items: Iterable[tuple[ObjectKey, msgspec.Raw]]
    ) -> dict[ObjectKey, Record | None]:
        """Those that can be read; the others are noted."""
        found: dict[ObjectKey, Record | None] = {}
        before = self.errors
        for key, item in items:
            self._known.add(key)
            self._bad.pop(key, None)
            try:
                found[key] = self._resource.decode(bytes(item))
            except ManifestError as error:
                self._bad[key] = error
        if self.errors != before:
            self._tell()
        return found

    def _key(self, metadata: _Named) -> ObjectKey:
        return ObjectKey(self._resource.kind, metadata.namespace, metadata.name)

    def _decode(self, data: bytes | msgspec.Raw, kind: type[_Anything]) -> _Anything:
        """Nothing but an API server answers so; a proxy in between may not be one."""
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ApiError(f"{self._client.url}: this is no API server's answer: {error}") from None

    def _explained(self, verb: str, error: ApiError) -> ApiError:
        text = f"cannot {verb} {self._resource.name}: {error}"
        if error.status == FORBIDDEN:
            text += f" (grant the verbs list and watch on {self._resource.name})"
        return ApiError(text, status=error.status, retry_after=error.retry_after)

    def _fail(self, error: ApiError) -> None:
        if str(error) != str(self._lost):
            self._lost = error
            self._tell()

    def _do_without(self, error: ApiError) -> None:
        """There are none, or those that were known before. That one may not know is a problem, but
        none of the source's.
        """
        if not self.listed:
            self._replace((), "")
        if error.status == ABSENT:
            self._recover()
        else:
            self._lost = SvcdpError(str(error))
            self._tell()

    def _recover(self) -> None:
        if self._lost is not None:
            self._lost = None
            self._tell()


def _is_gone(error: ApiError) -> bool:
    """Whether the server cannot go on from a version: it has forgotten it, or, restored from a
    backup, not come to it.
    """
    return error.status == GONE or "Too large resource version" in str(error)
