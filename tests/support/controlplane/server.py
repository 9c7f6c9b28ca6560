"""kube-apiserver, and what a test may do to it."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import ssl
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml

from controlplane.etcd import Etcd
from controlplane.process import DEADLINE, POLL, PROGRAM, Process, free_port

#: Who may log in, with which group. ``restricted`` and ``stranger`` may do nothing until
#: something is granted to them.
USERS: Mapping[str, str] = {"admin": "system:masters", "restricted": "", "stranger": ""}
ADMIN = "admin"
#: Where kube-apiserver keeps what.
FOLDERS: Mapping[str, str] = {
    "EndpointSlice": "endpointslices",
    "IPAddress": "ipaddresses",
    "Node": "minions",
    "Pod": "pods",
    "Service": "services/specs",
}
#: What is in no namespace.
GLOBAL = ("IPAddress", "Node")
#: More objects than this are deleted one by one for longer than a restart takes.
MANY = 2000
#: What answers once the server is ready. It makes the objects among them later than it says so.
READY = (
    "/readyz",
    "/api/v1/namespaces/default/services/kubernetes",
    "/api/v1/namespaces/kube-node-lease",
    "/api/v1/namespaces/kube-public",
)
REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"


class ControlPlane:
    """Starts with the context and is gone after it, with all that it stored.

    ``folder`` must be empty; ``flags`` are added to kube-apiserver's.
    """

    def __init__(self, folder: Path, flags: Sequence[str] = ()) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        #: What clients trust; written by the first start.
        self.authority = folder / "certificates" / "apiserver.crt"
        self._flags = tuple(flags)
        self._tokens = {user: secrets.token_hex(16) for user in USERS}
        #: User, verb and resource.
        self._grants: list[tuple[str, str, str]] = []
        self._server: Process | None = None

    def __enter__(self) -> ControlPlane:
        key = ["openssl", "genrsa", "-out", str(self.folder / "accounts.key"), "2048"]
        subprocess.run(key, check=True, capture_output=True)
        self._etcd = Etcd(self.folder)
        try:
            self.start()
            self._before = self._etcd.contents()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop(crash=True)
        finally:
            self._etcd.close()

    # The server's life.

    def start(self) -> None:
        """Start kube-apiserver, stopped before, at the same address; returns once it is ready."""
        assert self._server is None
        tokens = self.folder / "tokens.csv"
        lines = [f'{self._tokens[user]},{user},{user},"{group}"\n' for user, group in USERS.items()]
        tokens.write_text("".join(lines))
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
            "etcd-servers": self._etcd.url,
            "secure-port": self.port,
            "service-account-issuer": self.url,
            "service-account-key-file": self.folder / "accounts.key",
            "service-account-signing-key-file": self.folder / "accounts.key",
            "service-cluster-ip-range": "10.96.0.0/12",
            "token-auth-file": tokens,
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        self._server = Process("kube-apiserver", self.folder, *arguments, *self._flags)
        self._server.wait_until(self._is_ready)

    def stop(self, *, crash: bool = False) -> None:
        """Stop kube-apiserver, if it runs, and leave etcd running: watches end, connections are
        refused. With ``crash`` without a word to its clients."""
        server, self._server = self._server, None
        if server is not None:
            server.end(signal.SIGKILL if crash else signal.SIGTERM)

    def restart(self, *, crash: bool = False) -> None:
        """Stop and start. Watches from a version older than the newest get 410 Gone now: the
        server's cache of changes is empty."""
        self.stop(crash=crash)
        self.start()

    def compact(self) -> int:
        """Let etcd forget all but the newest version of each object, and return that version.
        Lists that go on from a page of an older version get 410 Gone. Watches do if the server
        reads them from etcd, by the flag ``--watch-cache=false``; else after `restart`."""
        return self._etcd.compact()

    def reset(self) -> None:
        """Put back every object, and every right, that was there at first. The server runs
        afterwards, with the same address and tokens."""
        if len(self._etcd.contents()) > len(self._before) + MANY:
            self.stop(crash=True)
        self._etcd.restore(self._before, at_once=self._server is None)
        if self._server is None:
            self.start()
        while self._grants:
            self._wait_for_right(*self._grants.pop(), given=False)

    # Objects.

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

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """``kubectl apply -f -``, of some objects in one go: 10 ms each."""
        self.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, objects)))

    def store(self, *objects: Mapping[str, Any]) -> None:
        """Write objects of `FOLDERS` as another API server would, past this one's checks and
        allocators, for whoever needs thousands: 1 ms each, or 0.1 ms while the server is
        stopped. Services need their ``clusterIP`` and ``clusterIPs``."""
        values = {
            _key(item): json.dumps(_made(item)).encode()
            for given in objects
            for item in (given, *_addresses(given))
        }
        self._etcd.put(values, at_once=self._server is None)

    def erase(self, *objects: Mapping[str, Any]) -> None:
        """Delete what `store` wrote."""
        keys = [_key(item) for given in objects for item in (given, *_addresses(given))]
        self._etcd.delete(keys, at_once=self._server is None)

    @contextmanager
    def request(
        self, method: str, path: str, body: Any = None, *, user: str = ADMIN, port: int = 0
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a plain HTTPS request, for what kubectl does not say: ``status`` is its
        code; read all of it or, of a watch, line by line. ``port`` is a relay's."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1",
            port or self.port,
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

    # Credentials.

    def token(self, user: str) -> str:
        """The bearer token of one of `USERS`."""
        return self._tokens[user]

    def expire_token(self, user: str) -> str:
        """Give the user another token and restart the server, which answers 401 Unauthorized to
        the old one; returns the new one."""
        self._tokens[user] = secrets.token_hex(16)
        self.restart(crash=True)
        return self._tokens[user]

    def grant(self, user: str, verbs: str, resources: str) -> None:
        """Let the user do that in all namespaces: ``grant("restricted", "list,watch",
        "services,nodes,endpointslices.discovery.k8s.io")``. Grants add up."""
        name = f"{user}-{secrets.token_hex(4)}"
        self.kubectl("create", "clusterrole", name, f"--verb={verbs}", f"--resource={resources}")
        role, subject = f"--clusterrole={name}", f"--user={user}"
        self.kubectl("create", "clusterrolebinding", name, role, subject)
        right = (user, verbs.split(",")[0], resources.split(",")[0])
        self._grants.append(right)
        self._wait_for_right(*right, given=True)

    def kubeconfig(self, user: str = ADMIN, *, url: str = "", **credentials: Any) -> Path:
        """A new kubeconfig file for the user; ``credentials`` (the fields of a kubeconfig's user:
        ``token``, ``tokenFile``, ``exec``...) replace their token, ``url`` the server's."""
        cluster = {"server": url or self.url, "certificate-authority": str(self.authority)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": credentials or {"token": self.token(user)}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        path = self.folder / f"kubeconfig-{user}-{secrets.token_hex(4)}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def _wait_for_right(self, user: str, verb: str, resource: str, *, given: bool) -> None:
        """The server learns of changed rights by a watch of its own."""
        plural, _, group = resource.partition(".")
        wanted = {"verb": verb, "resource": plural, "group": group}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": user, "resourceAttributes": wanted},
        }
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            with self.request("POST", REVIEWS, review) as answer:
                if json.loads(answer.read())["status"]["allowed"] == given:
                    return
            time.sleep(POLL)
        raise RuntimeError(f"{user}'s right to {verb} {resource} did not change")

    def _is_ready(self) -> bool:
        try:
            return all(self._answers(path) for path in READY)
        except OSError:  # no certificate yet, nobody listens yet
            return False

    def _answers(self, path: str) -> bool:
        with self.request("GET", path) as answer:
            return answer.status == HTTPStatus.OK


def _key(item: Mapping[str, Any]) -> str:
    """Where etcd has that object."""
    metadata = item["metadata"]
    folder = f"/registry/{FOLDERS[item['kind']]}"
    if item["kind"] not in GLOBAL:
        folder += f"/{metadata.get('namespace', 'default')}"
    return f"{folder}/{metadata['name']}"


def _made(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object with what an API server adds to its metadata."""
    metadata = {
        "uid": str(uuid.uuid5(uuid.NAMESPACE_URL, _key(item))),
        "creationTimestamp": "2026-01-01T00:00:00Z",
        **item["metadata"],
    }
    if item["kind"] not in GLOBAL:
        metadata.setdefault("namespace", "default")
    return {**item, "metadata": metadata}


def _addresses(item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the allocator of cluster IPs keeps of a Service; else it starts with repairs."""
    for address in item["spec"].get("clusterIPs", ()) if item["kind"] == "Service" else ():
        family = "IPv6" if ":" in address else "IPv4"
        namespace = item["metadata"].get("namespace", "default")
        parent = {"resource": "services", "namespace": namespace, "name": item["metadata"]["name"]}
        labels = {
            "ipaddress.kubernetes.io/ip-family": family,
            "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
        }
        yield {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "IPAddress",
            "metadata": {"name": address, "labels": labels},
            "spec": {"parentRef": parent},
        }
