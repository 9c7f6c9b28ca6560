"""What deploy/ has a cluster do: its rights, and the daemon on a node that it makes."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml
from controlplane import ControlPlane
from relay import Relay

from svcdp._version import __version__
from svcdp.cli._demo.daemon import RunningDaemon, running_daemon
from svcdp.lab import Lab, Topology, wait_until

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "svcdp.yaml"
ACCOUNT = "system:serviceaccount:svcdp:svcdp"
NODE, ADDRESS, PORT = "worker-1", "10.96.0.80", 80
TIMEOUT = 20.0
POOL = """\
apiVersion: svcdp.io/v1alpha1
kind: LoadBalancerPool
metadata: {name: lan}
spec: {addresses: [198.51.100.0/30]}
"""


def objects() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}


def container() -> Any:
    [found] = objects()["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    return found


def deploy(plane: ControlPlane) -> str:
    """Apply it, and return a token of its service account."""
    plane.kubectl("apply", "--server-side", "--validate=strict", "-f", MANIFEST)
    return plane.kubectl("create", "token", "svcdp", "--namespace=svcdp").strip()


def test_the_server_takes_the_manifest(plane: ControlPlane) -> None:
    deploy(plane)
    plane.kubectl("apply", "--dry-run=server", "--server-side", "-f", MANIFEST)
    # What the DaemonSet's controller would make of it passes admission too.
    template = objects()["DaemonSet"]["spec"]["template"]
    metadata = {**template["metadata"], "name": "svcdp-x", "namespace": "svcdp"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    plane.kubectl(
        "create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(pod)
    )
    assert container()["image"] == f"svcdp:{__version__}"
    assert [each["name"] for each in container()["env"]] == ["SVCDP_NODE_NAME"]


MAY = [("list", each) for each in ("services", "nodes")]
MAY += [("watch", "endpointslices.discovery.k8s.io"), ("list", "servicecidrs.networking.k8s.io")]
MAY += [("create", "events.events.k8s.io"), ("patch", "events.events.k8s.io")]
MAY += [("list", "loadbalancerpools.svcdp.io")]
MAY_NOT = [(verb, "secrets") for verb in ("get", "list", "watch")]
MAY_NOT += [("list", each) for each in ("pods", "configmaps", "events.events.k8s.io")]
MAY_NOT += [
    ("update", "services"),
    ("patch", "nodes"),
    ("delete", "endpointslices.discovery.k8s.io"),
]
MAY_NOT += [("create", "serviceaccounts/token"), ("get", "services")]
MAY_NOT += [(verb, "services/status") for verb in ("patch", "update")]
#: In its own namespace, and in no other one.
LEASES = [
    (verb, "leases.coordination.k8s.io") for verb in ("get", "list", "watch", "create", "patch")
]


def test_its_account_may_read_what_it_needs_and_no_more(plane: ControlPlane) -> None:
    token = deploy(plane)
    kubeconfig = plane.kubeconfig("svcdp", token=token)
    tried = [(verb, resource, "") for verb, resource in (*MAY, *MAY_NOT, *LEASES)]
    tried += [(verb, resource, "svcdp") for verb, resource in LEASES]
    for verb, resource, namespace in tried:
        plural, _, group = resource.partition(".")
        plural, _, subresource = plural.partition("/")
        wanted = {"verb": verb, "resource": plural, "group": group, "subresource": subresource}
        wanted["namespace"] = namespace
        is_allowed = namespace == "svcdp" or (verb, resource) in MAY
        kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
        review = {**kind, "spec": {"user": ACCOUNT, "resourceAttributes": wanted}}
        with plane.request(
            "POST", f"/apis/{kind['apiVersion']}/subjectaccessreviews", review
        ) as got:
            assert json.loads(got.read())["status"]["allowed"] == is_allowed, wanted
    with pytest.raises(subprocess.CalledProcessError) as refused:
        plane.kubectl("get", "secrets", "--all-namespaces", "--kubeconfig", kubeconfig)
    assert ACCOUNT in refused.value.stderr


class Cluster:
    """Namespaces, of which the node reaches the API server by loopback, and a Pod's files."""

    def __init__(self, plane: ControlPlane, topology: Topology, relay: Relay, folder: Path) -> None:
        self.plane = plane
        self.topology = topology
        self.folder = folder
        self.url = f"https://127.0.0.1:{relay.port}"
        self._port = relay.port
        self.account = folder / "account"
        self.account.mkdir()
        (self.account / "ca.crt").write_bytes(plane.authority.read_bytes())
        (self.account / "namespace").write_text("svcdp")

    def daemon(self, *arguments: str) -> contextlib.AbstractContextManager[RunningDaemon]:
        """``svcdp`` as the container starts it, with its service account's files."""
        account = "/run/secrets/kubernetes.io/serviceaccount"
        script = (
            f"mount -t tmpfs tmpfs /run && mkdir -p {account} && "
            f'mount --bind {self.account} {account} && exec "$@"'
        )
        more = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self._port),
            "SVCDP_NODE_NAME": NODE,
            "SVCDP_RUN_DIR": str(self.folder / "run"),
            "SVCDP_STATE_FILE": str(self.folder / "connections"),
        }

        def popen(_: list[str], *, env: Mapping[str, str], stderr: Any) -> Any:
            command = ["unshare", "--mount", "sh", "-c", script, "sh"]
            command += [sys.executable, "-m", "svcdp", *arguments]
            return self.topology.node.popen(command, env={**env, **more}, stderr=stderr)

        return running_daemon(popen, self.folder)

    def get(self, port: int = PORT, timeout: float = 5.0, address: str = ADDRESS) -> HTTPStatus:
        """What the client in its namespace hears at the cluster IP, or another address."""

        def ask() -> HTTPStatus:
            connection = http.client.HTTPConnection(address, port, timeout=timeout)
            with contextlib.closing(connection):
                connection.request("GET", "/")
                return HTTPStatus(connection.getresponse().status)

        return self.topology.client.call(ask)

    def hears(self, address: str = ADDRESS) -> str:
        """``served``, ``refused``, ``unreachable`` or ``silence``."""
        try:
            return "served" if self.get(timeout=1.0, address=address) == HTTPStatus.OK else "wrong"
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"
        except OSError as error:
            if error.errno != errno.ENETUNREACH:
                raise
            return "unreachable"

    def until(self, what: str, address: str = ADDRESS) -> None:
        wait_until(lambda: self.hears(address) == what, TIMEOUT, f"the client hears: {what}")


@pytest.fixture
def cluster(plane: ControlPlane, tmp_path: Path) -> Iterator[Cluster]:
    with Lab() as lab:
        topology = Topology.build(lab)
        topology.servers[0].start(http=(8080,))
        listener = topology.node.call(socket.create_server, ("127.0.0.1", 0))
        with Relay(plane.port, listener) as relay:
            yield Cluster(plane, topology, relay, tmp_path)


def node() -> dict[str, Any]:
    spec = {"podCIDR": "10.1.1.0/24", "podCIDRs": ["10.1.1.0/24"]}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "spec": spec}


def service(**annotations: str) -> dict[str, Any]:
    metadata = {"name": "web", "annotations": annotations}
    spec = {"clusterIP": ADDRESS, "clusterIPs": [ADDRESS], "ports": [{"port": PORT}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def endpoint_slice(address: str) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": "web"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]}],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


def test_a_node_serves_what_kubectl_makes(cluster: Cluster) -> None:
    """The daemon as the DaemonSet runs it, but for the image: configuration, account, rights."""
    plane = cluster.plane
    (cluster.account / "token").write_text(deploy(plane))
    plane.apply(node())
    config = cluster.folder / "node.yaml"
    config.write_text(objects()["ConfigMap"]["data"]["node.yaml"])
    arguments = [str(config) if each.endswith(".yaml") else each for each in container()["args"]]
    with cluster.daemon(*arguments) as daemon:
        # As of kube-proxy, kubectl says when it began.
        wait_until(
            lambda: "Starting" in plane.kubectl("describe", "node", NODE), TIMEOUT, "its Event"
        )
        # Of the networks that ServiceCIDRs say: nobody is there.
        assert cluster.hears() == "silence"
        plane.apply(service(**{"svcdp.io/scheduler": "best"}))
        cluster.until("refused")
        plane.apply(endpoint_slice(cluster.topology.servers[0].ipv4))
        cluster.until("served")
        with pytest.raises(ConnectionRefusedError):
            cluster.get(port=81)
        # Who made the Service sees what is wrong with it.
        wait_until(
            lambda: "InvalidAnnotation" in plane.kubectl("describe", "service", "web"),
            TIMEOUT,
            "the event is there",
        )
        # The account's token changes, as kubelet changes it, and the old one is no longer taken.
        plane.kubectl("delete", "serviceaccount", "svcdp", "--namespace=svcdp")
        (cluster.account / "token").write_text(deploy(plane))
        plane.restart(crash=True)
        assert cluster.hears() == "served"
        plane.kubectl("delete", "endpointslice", "web-1")
        cluster.until("refused")
        plane.kubectl("delete", "service", "web")
        cluster.until("silence")
        assert daemon.stop() == 0


def test_a_node_serves_the_address_that_the_controller_gives(cluster: Cluster) -> None:
    plane = cluster.plane
    (cluster.account / "token").write_text(deploy(plane))
    for name in ("loadbalancerpools.yaml", "svcdp-controller.yaml"):
        plane.kubectl("apply", "--server-side", "--validate=strict", "-f", MANIFEST.parent / name)
    plane.kubectl("wait", "--for=condition=Established", "crd/loadbalancerpools.svcdp.io")
    token = plane.kubectl("create", "token", "svcdp-controller", "--namespace=svcdp").strip()
    plane.apply(node(), service(), endpoint_slice(cluster.topology.servers[0].ipv4))
    plane.kubectl("patch", "service", "web", "-p", '{"spec":{"type":"LoadBalancer"}}')
    plane.kubectl("apply", "-f", "-", stdin=POOL)
    command = [sys.executable, "-m", "svcdp", "controller", "--bind-address="]
    command += ["--kubeconfig", str(plane.kubeconfig("svcdp-controller", token=token))]
    config = cluster.folder / "node.yaml"
    config.write_text(objects()["ConfigMap"]["data"]["node.yaml"])
    try:
        with (
            cluster.daemon("run", "--config", str(config), "--min-sync-period=0.1") as daemon,
            (cluster.folder / "controller.log").open("w") as log,
            subprocess.Popen(command, stderr=log) as controller,
        ):
            try:
                [item] = wait_until(
                    lambda: [each for each in daemon.get("services") if each["loadBalancerIPs"]],
                    TIMEOUT,
                    "the node knows of an address",
                )
                [address] = item["loadBalancerIPs"]
                assert address in ("198.51.100.1", "198.51.100.2")
                cluster.until("served", address)
                [found] = daemon.get("pools")
                assert (found["name"], found["used"], found["free"]) == ("lan", 1, 1)
                plane.kubectl("patch", "service", "web", "-p", '{"spec":{"type":"ClusterIP"}}')
                # As what no Service has, and the node has no route for.
                cluster.until("unreachable", address)
                assert daemon.get("pools")[0]["used"] == 0
                cluster.until("served")
            finally:
                controller.terminate()
    finally:
        plane.kubectl("delete", "crd", "loadbalancerpools.svcdp.io")


def test_kube_proxys_command_line_serves_too(cluster: Cluster) -> None:
    """As in the DaemonSet of kubeadm, with the image changed: its account, role and kubeconfig."""
    plane = cluster.plane
    plane.kubectl("create", "serviceaccount", "kube-proxy", "--namespace=kube-system")
    role = ["--clusterrole=system:node-proxier", "--serviceaccount=kube-system:kube-proxy"]
    plane.kubectl("create", "clusterrolebinding", "kubeadm:node-proxier", *role)
    token = cluster.account / "token"
    token.write_text(plane.kubectl("create", "token", "kube-proxy", "--namespace=kube-system"))
    kubeconfig = plane.kubeconfig("kube-proxy", url=cluster.url, tokenFile=str(token))
    plane.apply(node(), service(), endpoint_slice(cluster.topology.servers[0].ipv4))
    config = cluster.folder / "config.conf"
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        f"clientConnection: {{kubeconfig: {kubeconfig}}}\n"
        "mode: iptables\nclusterCIDR: 10.1.0.0/16\nconntrack: {maxPerCore: 1}\n"
    )
    command = ("kube-proxy", f"--config={config}", f"--hostname-override={NODE}")
    with cluster.daemon(*command) as daemon:
        cluster.until("served")
        plane.apply(service(**{"svcdp.io/scheduler": "best"}))
        wait_until(
            lambda: "InvalidAnnotation" in plane.kubectl("describe", "service", "web"),
            TIMEOUT,
            "the event is there",
        )
        assert daemon.stop() == 0
    [warning] = [
        line
        for line in (cluster.folder / "log").read_text().splitlines()
        if "of kube-proxy's configuration" in line
    ]
    assert "conntrack.maxPerCore is ignored" in warning
