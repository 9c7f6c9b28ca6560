"""A Kubernetes control plane on loopback: the real kube-apiserver and etcd, two processes."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml

PROGRAM = Path(__file__).parents[2] / "build" / "cluster" / "apiserver"

#: Who may log in, with which groups. ``restricted`` and ``stranger`` may do nothing until
#: somebody grants it.
USERS: Mapping[str, str] = {"admin": "system:masters", "restricted": "", "stranger": ""}
ADMIN = "admin"
#: Of whole starts, stops and answers, seconds; never reached unless something is broken.
DEADLINE = 60.0
POLL = 0.05
#: What tests make, and `ControlPlane.reset` deletes.
KINDS = (
    "/api/v1/services",
    "/apis/discovery.k8s.io/v1/endpointslices",
    "/api/v1/pods",
    "/api/v1/nodes",
    "/apis/events.k8s.io/v1/events",
    "/apis/networking.k8s.io/v1/servicecidrs",
    "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
)
#: How the names of the server's own objects begin.
OWN = ("kubernetes", "system:", "cluster-admin")


class ControlPlane:
    """Starts with the context and is gone after it, with all that it stored.

    ``folder`` must be empty; ``flags`` are added to kube-apiserver's.
    """

    def __init__(self, folder: Path, flags: Sequence[str] = ()) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        #: What clients trust; written by the first start.
        self.authority = folder / "certificates" / "apiserver.crt"
        self._flags = tuple(flags)
        self._tokens = {user: secrets.token_hex(16) for user in USERS}
        self._etcd_port = _free_port()
        self._etcd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ControlPlane:
        try:
            self._start_etcd()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._server, signal.SIGKILL)
        _end(self._etcd, signal.SIGKILL)
        self._server = self._etcd = None

    # The server's life.

    def start(self) -> None:
        """Start kube-apiserver, stopped before, at the same address; returns once it is ready."""
        assert self._server is None
        (self.folder / "tokens.csv").write_text(
            "".join(
                f'{self._tokens[user]},{user},{user},"{groups}"\n' for user, groups in USERS.items()
            )
        )
        flags = {
            "advertise-address": "127.0.0.1",
            "allow-privileged": "true",
            "authorization-mode": "RBAC",
            "bind-address": "127.0.0.1",
            "cert-dir": self.authority.parent,
            # Nobody makes default ServiceAccounts, which this plugin wants for every Pod.
            "disable-admission-plugins": "ServiceAccount",
            # An Endpoints object may not hold loopback addresses.
            "endpoint-reconciler-type": "none",
            "etcd-servers": f"http://127.0.0.1:{self._etcd_port}",
            "secure-port": self.port,
            "service-account-issuer": self.url,
            "service-account-key-file": self.folder / "accounts.key",
            "service-account-signing-key-file": self.folder / "accounts.key",
            "service-cluster-ip-range": "10.96.0.0/12",
            "shutdown-delay-duration": "0s",
            "token-auth-file": self.folder / "tokens.csv",
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        self._server = self._run("kube-apiserver", *arguments, *self._flags)
        self._wait("kube-apiserver", self._server, self._server_is_ready)

    def stop(self, *, crash: bool = False) -> None:
        """Stop kube-apiserver and leave etcd running: watches end, connections are refused.
        With ``crash`` without a word to its clients."""
        _end(self._server, signal.SIGKILL if crash else signal.SIGTERM)
        self._server = None

    def restart(self, *, crash: bool = False) -> None:
        """Stop and start. What was watched before is resumed only from the newest version: the
        server's cache of changes is empty, and older versions get 410 Gone."""
        self.stop(crash=crash)
        self.start()

    def compact(self) -> int:
        """Let etcd forget all but the newest version of each object, and return that version.
        Lists that go on from a page of an older version get 410 Gone, and watches from one do
        when the server reads them from etcd: after `restart`, or with the flag
        ``--watch-cache=false``."""
        key = {"key": "AA==", "count_only": True}  # every answer tells the revision
        revision = int(self._ask_etcd("range", key)["header"]["revision"])
        self._ask_etcd("compaction", {"revision": revision, "physical": True})
        return revision

    def reset(self) -> None:
        """Delete what tests made, in every namespace, and take back what was granted; the
        server runs afterwards, with the same address and tokens."""
        if self._server is None:
            self.start()
        for kind in KINDS:
            for item in self.get(kind)["items"]:
                if not item["metadata"]["name"].startswith(OWN):
                    self._delete(kind, item["metadata"])

    # Credentials and clients.

    def token(self, user: str) -> str:
        """The bearer token of one of `USERS`."""
        return self._tokens[user]

    def expire_token(self, user: str) -> str:
        """Give the user another token and restart the server, which answers 401 Unauthorized to
        the old one; returns the new one."""
        self._tokens[user] = secrets.token_hex(16)
        self.restart()
        return self._tokens[user]

    def grant(self, user: str, verbs: str, resources: str) -> None:
        """Let the user do that in all namespaces: ``grant("restricted", "list,watch",
        "services,nodes,endpointslices.discovery.k8s.io")``. Grants add up."""
        name = f"{user}-{secrets.token_hex(4)}"
        self.kubectl("create", "clusterrole", name, f"--verb={verbs}", f"--resource={resources}")
        self.kubectl(
            "create", "clusterrolebinding", name, f"--clusterrole={name}", f"--user={user}"
        )

    def kubeconfig(self, user: str = ADMIN, *, url: str = "", **credentials: Any) -> Path:
        """A new kubeconfig file for the user; ``credentials`` (the fields of a kubeconfig's user:
        ``token``, ``tokenFile``, ``exec``...) replace their token, ``url`` the server's."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": url or self.url,
                        "certificate-authority": str(self.authority),
                    },
                }
            ],
            "users": [{"name": user, "user": credentials or {"token": self.token(user)}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        path = self.folder / f"kubeconfig-{user}-{secrets.token_hex(4)}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def kubectl(self, *arguments: str | Path, stdin: str = "", user: str = ADMIN) -> str:
        """What the real kubectl prints. Raises `subprocess.CalledProcessError`, whose ``stderr``
        says why."""
        return subprocess.run(
            [PROGRAM, "kubectl", "--kubeconfig", self.kubeconfig(user), *arguments],
            input=stdin,
            env={"HOME": str(self.folder), "PATH": os.defpath},
            check=True,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        ).stdout

    def apply(self, *manifests: Mapping[str, Any]) -> None:
        """``kubectl apply -f -``, of any number of objects in one go."""
        self.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, manifests)))

    @contextmanager
    def request(
        self, method: str, path: str, body: Any = None, *, user: str = ADMIN
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a plain HTTPS request, for what kubectl does not say: ``status`` is its
        code; read all of it or, of a watch, line by line."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1",
            self.port,
            timeout=DEADLINE,
            context=ssl.create_default_context(cafile=str(self.authority)),
        )
        headers = {
            "Authorization": f"Bearer {self.token(user)}",
            "Content-Type": "application/json",
        }
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def get(self, path: str, *, user: str = ADMIN) -> Any:
        """The object or list at that path. Raises `http.client.HTTPException` with the server's
        words if there is none for that user."""
        with self.request("GET", path, user=user) as answer:
            content = answer.read()
        if answer.status != HTTPStatus.OK:
            raise http.client.HTTPException(content.decode(errors="replace"))
        return json.loads(content)

    # The processes.

    def _delete(self, kind: str, metadata: Mapping[str, str]) -> None:
        folder, _, plural = kind.rpartition("/")
        if "namespace" in metadata:
            folder += f"/namespaces/{metadata['namespace']}"
        path = f"{folder}/{plural}/{metadata['name']}"
        with self.request("DELETE", path, {"gracePeriodSeconds": 0}) as answer:
            content = answer.read()
        assert answer.status == HTTPStatus.OK, content

    def _ask_etcd(self, action: str, body: Mapping[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=DEADLINE)
        try:
            connection.request("POST", f"/v3/kv/{action}", json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        assert answer.status == HTTPStatus.OK, content
        return json.loads(content)

    def _start_etcd(self) -> None:
        url = f"http://127.0.0.1:{self._etcd_port}"
        key = ["openssl", "genrsa", "-out", str(self.folder / "accounts.key"), "2048"]
        subprocess.run(key, check=True, capture_output=True)
        self._etcd = self._run(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            "--listen-peer-urls=http://127.0.0.1:0",
            # Nothing outlives the test that a loss of power could spoil.
            "--unsafe-no-fsync",
        )
        self._wait("etcd", self._etcd, self._etcd_is_ready)

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([PROGRAM, name, *arguments], stdout=log, stderr=log)

    def _etcd_is_ready(self) -> bool:
        try:
            self._ask_etcd("range", {"key": "AA=="})
        except OSError:
            return False
        return True

    def _server_is_ready(self) -> bool:
        try:
            with self.request("GET", "/readyz") as answer:
                return answer.status == HTTPStatus.OK
        except OSError:  # no certificate yet, nobody listens yet
            return False

    def _wait(self, name: str, process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} did not start:\n{log[-4000:]}")
            time.sleep(POLL)


def _end(process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
    """End a process of ours, and wait until it is gone."""
    if process is None:
        return
    process.send_signal(number)
    try:
        process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
