"""Requests to an API server: where it is, who asks, and what its refusals mean.

lightkube reads the configuration and logs in, but by plugins; nothing else knows of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec
import yaml
from lightkube.config.client_adapter import AsyncClient, ConnectionParams, ExecAuth
from lightkube.config.kubeconfig import KubeConfig
from lightkube.config.models import User
from lightkube.core.exceptions import ConfigError as LightkubeError

from svcdp.errors import ConfigError
from svcdp.kube.plugin import PluginAuth
from svcdp.kube.reflector import ApiError

__all__ = ["Client"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0  # seconds
ANSWER_TIMEOUT = 60.0  # seconds until an answer begins, plugins that log in included
READ_TIMEOUT = 30.0  # seconds without a byte of an answer
LONGEST_WAIT = 60.0  # seconds that a server may ask for; one that asks for more is asked anew
LINE_MAX = 64 << 20  # bytes of an event; etcd holds objects of 1.5 MiB

# What a plugin's output, and a kubeconfig, may be wrong in.
_BAD_CONFIG = (LightkubeError, OSError, KeyError, TypeError, ValueError, AttributeError)


class _Status(msgspec.Struct):
    """The part of a ``v1`` Status that people read."""

    message: str = ""


@dataclass(slots=True, eq=False)
class _Session:
    """Connections with the same credentials. Watches go on when these are no longer good."""

    http: httpx2.AsyncClient
    users: int = 0
    is_good: bool = True


class Client:
    """An API server and who asks it.

    ``kubeconfig`` is a file, and ``context`` one of its contexts ("": its current one); without
    a file a Pod's service account counts. Tokens, certificates and exec plugins are read again
    when the server no longer takes them. Raises ConfigError for a bad configuration.
    For one event loop.
    """

    def __init__(self, kubeconfig: str | os.PathLike[str] | None = None, context: str = "") -> None:
        self._kubeconfig = kubeconfig
        self._context = context
        self._session = self._connect()
        #: Where the server is.
        self.url = str(self._session.http.base_url).rstrip("/")

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        """The body of an answer. Raises ApiError."""
        return await self._whole("GET", path, params=params)

    async def post(self, path: str, body: bytes) -> bytes:
        """Make an object, in JSON; returns it as the server has it. Raises ApiError."""
        headers = {"Content-Type": "application/json"}
        return await self._whole("POST", path, content=body, headers=headers)

    async def patch(self, path: str, body: bytes) -> bytes:
        """Merge a part of an object, in JSON, into it (RFC 7396). Raises ApiError."""
        headers = {"Content-Type": "application/merge-patch+json"}
        return await self._whole("PATCH", path, content=body, headers=headers)

    async def watch(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncGenerator[bytes, None]:
        """The lines of an answer that goes on; an empty one first, as soon as it is granted.

        Ends when the server ends it, when the connection breaks, and after ``silence`` seconds
        without a byte. Raises ApiError if it is not granted.
        """
        timeout = httpx2.Timeout(CONNECT_TIMEOUT, read=silence)
        async with self._request("GET", path, params=params, timeout=timeout) as response:
            yield b""
            rest = bytearray()
            try:
                async for data in response.aiter_bytes():
                    rest += data
                    if b"\n" in data:
                        *lines, rest = rest.split(b"\n")
                        for line in lines:
                            yield bytes(line)
                    elif len(rest) > LINE_MAX:
                        raise ApiError(f"{self.url}: an event of more than {LINE_MAX >> 20} MiB")
            except httpx2.TransportError as error:
                log.debug("a watch broke", extra={"path": path, "error": repr(error)})
            except httpx2.DecodingError as error:
                raise self._unreachable(error) from error

    async def close(self) -> None:
        """Idempotent. Whoever is still asking gets an ApiError."""
        await self._session.http.aclose()
        await asyncio.sleep(0)  # asyncio closes sockets in its next round

    async def _whole(self, method: str, path: str, **more: Any) -> bytes:
        async with self._request(method, path, **more) as response:
            try:
                return await response.aread()
            except httpx2.HTTPError as error:
                raise self._unreachable(error) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, **more: Any
    ) -> AsyncGenerator[httpx2.Response, None]:
        try:
            session = await self._current()
        except ConfigError as error:
            raise ApiError(str(error)) from error
        session.users += 1
        try:
            response = await self._send(session.http, method, path, **more)
            try:
                if response.status_code == 401:
                    session.is_good = False
                if response.status_code >= 400:
                    body = b""
                    with suppress(httpx2.HTTPError):  # the status says enough
                        body = await response.aread()
                    raise _refusal(self.url, response, body)
                yield response
            finally:
                await response.aclose()
        finally:
            session.users -= 1
            if session is not self._session and not session.users:
                await session.http.aclose()

    async def _current(self) -> _Session:
        """One with credentials that were not refused yet."""
        old = self._session
        if not old.is_good:
            self._session = self._connect()
            if not old.users:
                await old.http.aclose()
        return self._session

    async def _send(
        self, http: httpx2.AsyncClient, method: str, path: str, **more: Any
    ) -> httpx2.Response:
        """Until the head of the answer is there."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await http.send(http.build_request(method, path, **more), stream=True)
        except TimeoutError as error:
            raise ApiError(f"{self.url}: no answer within {ANSWER_TIMEOUT:.0f} s") from error
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from error
        except _BAD_CONFIG as error:
            raise ApiError(
                f"{self.url}: no credentials: {error or type(error).__name__}"
            ) from error

    def _unreachable(self, error: Exception) -> ApiError:
        return ApiError(f"{self.url}: {error}".removesuffix(": ") + f" ({type(error).__name__})")

    def _connect(self) -> _Session:
        where = str(self._kubeconfig or "the Pod's service account")
        try:
            config = (
                KubeConfig.from_file(self._kubeconfig)
                if self._kubeconfig
                else KubeConfig.from_service_account()
            ).get(self._context or None)
            assert config is not None  # no default was given
            if config.user is None:
                config = config._replace(user=User())
            assert config.user is not None
            if config.user.token_file:
                config.user.token_file = str(config.abs_file(config.user.token_file))
            timeout = httpx2.Timeout(CONNECT_TIMEOUT, read=READ_TIMEOUT)
            http = AsyncClient(config, ConnectionParams(timeout=timeout))
            if isinstance(http.auth, ExecAuth):
                assert config.user.exec is not None
                http.auth = PluginAuth(config.user.exec)
            return _Session(http)
        except (*_BAD_CONFIG, yaml.YAMLError, httpx2.InvalidURL) as error:
            text = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ConfigError(f"{where}: cannot be used to reach a cluster: {text}") from error


def _refusal(url: str, response: httpx2.Response, body: bytes) -> ApiError:
    try:
        message = msgspec.json.decode(body, type=_Status).message
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        message = ""
    wait = response.headers.get("Retry-After", "")
    return ApiError(
        f"{url}: {response.status_code} {response.reason_phrase}: {message or 'no reason given'}",
        status=response.status_code,
        retry_after=min(float(wait), LONGEST_WAIT) if wait.isascii() and wait.isdigit() else 0.0,
    )
