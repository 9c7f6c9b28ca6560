"""Programs that log in to a cluster for others, as a kubeconfig names them under ``exec``.

https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator
from contextlib import suppress

import httpx2
import msgspec
from lightkube.config.models import UserExec

from svcdp.errors import ConfigError

__all__ = ["PluginAuth"]

VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
REAP_TIME = 1.0  # seconds until a plugin that was killed is gone


class _Status(msgspec.Struct):
    token: str


class _Credential(msgspec.Struct):
    """What a plugin prints; of credentials other than tokens nothing is known here."""

    status: _Status


class PluginAuth(httpx2.Auth):
    """Has a plugin log in before the first request, once.

    A plugin that does not end is killed when the request is given up. For one event loop.
    ConfigError if the plugin speaks another protocol.
    """

    def __init__(self, plugin: UserExec) -> None:
        if plugin.apiVersion not in VERSIONS:
            raise ConfigError(f"exec: apiVersion {plugin.apiVersion} is none of {VERSIONS}")
        self._plugin = plugin
        self._token = ""
        self._turn = asyncio.Lock()  # several requests begin at once

    async def async_auth_flow(
        self, request: httpx2.Request
    ) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """Called for each request. Raises ConfigError, or OSError if there is no such program."""
        async with self._turn:
            if not self._token:
                self._token = await _ask(self._plugin)
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


async def _ask(plugin: UserExec) -> str:
    """A token."""
    asked = {
        "apiVersion": plugin.apiVersion,
        "kind": "ExecCredential",
        "spec": {"interactive": False},
    }
    given = {each.name: each.value for each in plugin.env or ()}
    variable = {"KUBERNETES_EXEC_INFO": msgspec.json.encode(asked).decode()}
    process = await asyncio.create_subprocess_exec(
        plugin.command,
        *(plugin.args or ()),
        env={**os.environ, **given, **variable},
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        out, said = await process.communicate()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            with suppress(TimeoutError):  # what it has started may hold its pipes
                async with asyncio.timeout(REAP_TIME):
                    await process.communicate()
    if process.returncode:
        text = said.decode(errors="replace").strip()
        raise ConfigError(f"{plugin.command} ended with {process.returncode}: {text}")
    try:
        return msgspec.json.decode(out, type=_Credential).status.token
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{plugin.command} prints no token: {error}") from None
