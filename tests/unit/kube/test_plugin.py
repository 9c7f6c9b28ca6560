"""Programs that log in: what they are asked and print, and that none outlives its request."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from svcdp.errors import ConfigError
from svcdp.kube.client import Client
from svcdp.kube.reflector import ApiError

DEADLINE = 20.0
V1 = "client.authentication.k8s.io/v1"
SAYS = "import json; print(json.dumps({'status': {'token': 'secret'}}))"


def kubeconfig(folder: Path, script: str, port: int = 1, version: str = V1) -> Path:
    command = {"command": sys.executable, "args": ["-c", script]}
    env = [{"name": "FOLDER", "value": str(folder)}]
    named = {
        "clusters": {"cluster": {"server": f"http://127.0.0.1:{port}"}},
        "users": {"user": {"exec": {"apiVersion": version, "env": env, **command}}},
        "contexts": {"context": {"cluster": "a", "user": "a"}},
    }
    config = {key: [{"name": "a", **value}] for key, value in named.items()}
    file = folder / "config"
    file.write_text(json.dumps({"current-context": "a", **config}))
    return file


@pytest.mark.parametrize("version", [V1, f"{V1}beta1"])
def test_one_token_for_all_requests(tmp_path: Path, version: str) -> None:
    noted = (
        "import os; open(os.environ['FOLDER'] + '/asked', 'a')"
        ".write(os.environ['KUBERNETES_EXEC_INFO'] + '\\n');"
    )
    heads: list[str] = []

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(say, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Client(kubeconfig(tmp_path, noted + SAYS, port, version))
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(client.get("/x", {}) for _ in range(3)))
        await client.close()
        server.close()

    asyncio.run(main())
    assert ["Bearer secret" in head for head in heads] == [True] * 3
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert json.loads(asked) == {
        "apiVersion": version,
        "kind": "ExecCredential",
        "spec": {"interactive": False},
    }


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; sys.exit('no such user')", "ended with 1: no such user"),
        ("print('{}')", "prints no token: Object missing required field `status`"),
        ("print('hello')", "prints no token: JSON is malformed"),
        ("import sys; sys.stdout.buffer.write(b'\"\\xff\"')", "prints no token"),
    ],
)
def test_what_a_plugin_says_of_its_failure_is_told(
    tmp_path: Path, script: str, message: str
) -> None:
    async def main() -> str:
        client = Client(kubeconfig(tmp_path, script))
        try:
            with pytest.raises(ApiError) as caught:
                await client.get("/x", {})
        finally:
            await client.close()
        return str(caught.value)

    text = asyncio.run(main())
    assert f"no credentials: {sys.executable} {message}" in text


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apiVersion other/v1 is none of"):
        Client(kubeconfig(tmp_path, SAYS, version="other/v1"))


def test_a_plugin_that_hangs_ends_with_its_request(tmp_path: Path) -> None:
    script = (
        "import os, time;"
        "folder = os.environ['FOLDER'];"
        "open(folder + '/new', 'w').write(str(os.getpid()));"
        "os.rename(folder + '/new', folder + '/pid');"
        "time.sleep(1000)"
    )

    async def main() -> int:
        client = Client(kubeconfig(tmp_path, script))
        asking = asyncio.create_task(client.get("/x", {}))
        async with asyncio.timeout(DEADLINE):
            while not (tmp_path / "pid").exists():
                await asyncio.sleep(0.01)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await client.close()
        return int((tmp_path / "pid").read_text())

    deadline = time.monotonic() + DEADLINE
    pid = asyncio.run(main())
    while is_running(pid):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """A zombie does not run."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
