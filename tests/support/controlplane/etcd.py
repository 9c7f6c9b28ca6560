"""etcd, by the JSON form of its protocol: https://etcd.io/docs/latest/dev-guide/api_grpc_gateway."""

from __future__ import annotations

import http.client
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from controlplane.process import DEADLINE, Process, free_port

#: Of one transaction; etcd takes 128.
BATCH = 100
#: Where API servers write by themselves while they live.
LEASES = ("/registry/leases/kube-system/", "/registry/peerserverleases/")


class Stored(NamedTuple):
    """A value and the revision that wrote it."""

    value: bytes
    revision: int


class Etcd:
    """Runs until `close`, with its data in ``folder``."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = Process(
            "etcd",
            folder,
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            "--listen-peer-urls=http://127.0.0.1:0",
            # It elects itself, at once.
            "--heartbeat-interval=10",
            "--election-timeout=100",
            # Nothing here has to outlive a loss of power.
            "--unsafe-no-fsync",
        )
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        try:
            self._process.wait_until(self._is_ready)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()
        self._process.end()

    def put(self, values: Mapping[str, bytes], *, at_once: bool = False) -> None:
        """Write these keys. API servers that run count on a revision for each; ``at_once`` is
        faster and for those that do not."""
        self._write(
            "put",
            (
                {"key": _encode(key), "value": b64encode(value).decode()}
                for key, value in values.items()
            ),
            at_once,
        )

    def delete(self, keys: Iterable[str], *, at_once: bool = False) -> None:
        """Delete these keys, if they are there; ``at_once`` as above."""
        self._write("delete_range", ({"key": _encode(key)} for key in keys), at_once)

    def contents(self) -> dict[str, Stored]:
        """Everything but the leases."""
        everything = {"key": _encode("/"), "range_end": _encode("0")}
        pairs = self._ask("range", everything).get("kvs", [])
        stored = {
            b64decode(pair["key"]).decode(): Stored(
                b64decode(pair["value"]), int(pair["mod_revision"])
            )
            for pair in pairs
        }
        return {key: value for key, value in stored.items() if not key.startswith(LEASES)}

    def restore(self, before: Mapping[str, Stored], *, at_once: bool = False) -> None:
        """Make `contents` what it was; ``at_once`` as above."""
        now = self.contents()
        self.delete([key for key in now if key not in before], at_once=at_once)
        changed = {key: old.value for key, old in before.items() if now.get(key) != old}
        self.put(changed, at_once=at_once)

    def compact(self) -> int:
        """Forget all but the newest revision, and return that."""
        answer = self._ask("range", {"key": _encode("/"), "count_only": True})
        revision = int(answer["header"]["revision"])
        self._ask("compaction", {"revision": revision, "physical": True})
        return revision

    def _write(self, action: str, bodies: Iterable[Mapping[str, Any]], at_once: bool) -> None:
        rest = iter(bodies)
        while batch := list(islice(rest, BATCH if at_once else 1)):
            self._ask("txn", {"success": [{f"request_{action}": body} for body in batch]})

    def _is_ready(self) -> bool:
        try:
            self._ask("range", {"key": _encode("/")})
        except OSError:  # nobody listens yet
            self._connection.close()
            return False
        return True

    def _ask(self, action: str, body: Mapping[str, Any]) -> Any:
        self._connection.request("POST", f"/v3/kv/{action}", json.dumps(body))
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != HTTPStatus.OK:
            raise RuntimeError(f"etcd, {action}: {content.decode(errors='replace')}")
        return json.loads(content)


def _encode(key: str) -> str:
    return b64encode(key.encode()).decode()
