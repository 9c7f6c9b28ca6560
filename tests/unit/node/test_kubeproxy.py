"""kube-proxy's configuration, row by row: what it becomes, what is ignored, what is refused."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from svcdp.errors import ConfigError
from svcdp.node import kubeproxy
from svcdp.node.config import LoadedConfig, load

# As kubeadm writes it, of Kubernetes 1.37.
KUBEADM = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd01::/48
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null,
  tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s,
  syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", strictARP: false, syncPeriod: 0s,
  tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}
logging: {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}},
  verbosity: 0}
metricsBindAddress: ""
mode: ""
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "",
  rootHnsEndpointName: "", sourceVip: ""}
"""
EVERYWHERE = ("0.0.0.0/0", "::/0")


def from_file(tmp_path: Path, **values: Any) -> LoadedConfig:
    """Values by dotted key, with ``__`` for the dot."""
    root: dict[str, Any] = {"apiVersion": kubeproxy.API_VERSION, "kind": kubeproxy.KIND}
    for path, value in values.items():
        *parents, name = path.split("__")
        place = root
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    file = tmp_path / "config.conf"
    file.write_text(yaml.safe_dump(root))
    return load(str(file), environ={})


def from_flags(line: str) -> LoadedConfig:
    return load(environ={}, kube_proxy=shlex.split(line))


def test_the_file_of_kubeadm(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(KUBEADM)
    line = f"--config={file} --hostname-override=Worker-1"
    loaded = from_flags(line)
    assert len(loaded.notes) == 1  # the width of buffers of a log
    config = loaded.config
    assert config.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert config.node_name == "worker-1"
    assert config.pod_cidrs == ("10.244.0.0/16", "fd01::/48")
    assert config.node_port_addresses == EVERYWHERE
    assert config.detect_local_mode == "ClusterCIDR"
    assert config.healthz_bind_address == "0.0.0.0:10256"
    assert config.metrics_bind_address == "127.0.0.1:10249"
    assert config.primary_addresses == ()
    assert config.min_sync_period == 1.0
    # The same by `svcdp run --config`, but for the flag.
    flags = {"node_name": "worker-1"}
    assert load(str(file), environ={}, flags=flags).config == config


IPVS, NFT = {"mode": "ipvs"}, {"mode": "nftables"}
FILES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # what the file says, what is set
    ({}, {"kubeconfig": "in-cluster", "node_port_addresses": EVERYWHERE}),
    (NFT, {"node_port_addresses": ()}),
    ({"nodePortAddresses": ["primary"]}, {"node_port_addresses": ()}),
    ({"nodePortAddresses": ["192.0.2.0/24"]}, {"node_port_addresses": ("192.0.2.0/24",)}),
    ({"hostnameOverride": " N1 "}, {"node_name": "n1"}),
    ({"bindAddress": "192.0.2.1"}, {"primary_addresses": ("192.0.2.1",)}),
    (
        {"bindAddress": "::"},
        {"primary_addresses": (), "healthz_bind_address": "[::]:10256"},
    ),
    ({"bindAddress": "2001:db8::1"}, {"metrics_bind_address": "[::1]:10249"}),
    ({"healthzBindAddress": "192.0.2.1"}, {"healthz_bind_address": "192.0.2.1:10256"}),
    ({"healthzBindAddress": "192.0.2.1:99"}, {"healthz_bind_address": "192.0.2.1:99"}),
    ({"metricsBindAddress": "2001:db8::1"}, {"metrics_bind_address": "[2001:db8::1]:10249"}),
    ({"metricsBindAddress": "[::]:9999"}, {"metrics_bind_address": "[::]:9999"}),
    (
        {"detectLocalMode": "NodeCIDR", "clusterCIDR": "10.0.0.0/8"},
        {"detect_local_mode": "NodeCIDR", "pod_cidrs": ()},
    ),
    (
        {"detectLocalMode": "BridgeInterface", "detectLocal__bridgeInterface": "cni0"},
        {"detect_local_mode": "BridgeInterface", "pod_interface": "cni0"},
    ),
    (
        {"detectLocalMode": "InterfaceNamePrefix", "detectLocal__interfaceNamePrefix": "veth"},
        {"detect_local_mode": "InterfaceNamePrefix", "pod_interface": "veth+"},
    ),
    ({"iptables__masqueradeAll": True}, {"masquerade_all": True}),
    ({**IPVS, "iptables__masqueradeAll": True}, {"masquerade_all": True}),
    ({**NFT, "iptables__masqueradeAll": True}, {"masquerade_all": False}),
    ({**NFT, "nftables__masqueradeAll": True}, {"masquerade_all": True}),
    ({"iptables__minSyncPeriod": "1m1.5s"}, {"min_sync_period": 61.5}),
    ({**IPVS, "ipvs__minSyncPeriod": "5s"}, {"min_sync_period": 5.0}),
    ({**NFT, "ipvs__minSyncPeriod": "5s"}, {"min_sync_period": 1.0}),
    ({**IPVS, "ipvs__scheduler": "lc"}, {"scheduler": "lc"}),
    ({"ipvs__scheduler": "lc"}, {"scheduler": "rr"}),
    (
        {**IPVS, "ipvs__tcpTimeout": "2h", "ipvs__udpTimeout": "500ms"},
        {"timeouts": ("established=7200", "udp=0.5")},
    ),
    ({"logging__format": "json", "logging__verbosity": 4}, {"log_format": "json"}),
    ({"logging__verbosity": 4}, {"log_level": "debug"}),
    ({"iptables__localhostNodePorts": False}, {"localhost_node_ports": False}),
    ({"iptables__localhostNodePorts": True}, {"localhost_node_ports": True}),
    ({}, {"localhost_node_ports": True}),
    ({"nodePortAddresses": ["192.0.2.0/24"]}, {"localhost_node_ports": False}),
    ({"nodePortAddresses": ["127.0.0.0/8"]}, {"localhost_node_ports": True}),
    (IPVS, {"localhost_node_ports": False}),
    ({**NFT, "iptables__localhostNodePorts": True}, {"localhost_node_ports": False}),
]


@pytest.mark.parametrize(("said", "expected"), FILES, ids=repr)
def test_what_a_file_says(tmp_path: Path, said: dict[str, Any], expected: dict[str, Any]) -> None:
    loaded = from_file(tmp_path, **said)
    assert {name: getattr(loaded.config, name) for name in expected} == expected
    assert loaded.notes == ()


FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("", {"kubeconfig": "in-cluster", "log_level": "info"}),
    ("--kubeconfig=/k", {"kubeconfig": "/k"}),
    ("--cluster-cidr 10.0.0.0/8", {"pod_cidrs": ("10.0.0.0/8",)}),
    ("--masquerade-all", {"masquerade_all": True}),
    ("--masquerade-all=true --proxy-mode nftables", {"masquerade_all": True}),
    ("--masquerade-all=F", {"masquerade_all": False}),
    ("--nodeport-addresses=10.0.0.0/8,::/0", {"node_port_addresses": ("10.0.0.0/8", "::/0")}),
    ("--proxy-mode=ipvs --ipvs-scheduler=wlc", {"scheduler": "wlc"}),
    (
        "--detect-local-mode=InterfaceNamePrefix --pod-interface-name-prefix=veth",
        {"pod_interface": "veth+"},
    ),
    ("--healthz-port=0 --metrics_port=0", {"healthz_bind_address": "", "metrics_bind_address": ""}),
    ("--healthz-bind-address=127.0.0.1:1", {"healthz_bind_address": "127.0.0.1:1"}),
    ("--bind-address=192.0.2.1", {"primary_addresses": ("192.0.2.1",)}),
    ("-v 4", {"log_level": "debug"}),
    ("-v=5", {"log_level": "debug"}),
    ("-v6", {"log_level": "debug"}),
    ("--v=2", {"log_level": "info"}),
]


@pytest.mark.parametrize(("line", "expected"), FLAGS)
def test_what_flags_say(line: str, expected: dict[str, Any]) -> None:
    loaded = from_flags(line)
    assert {name: getattr(loaded.config, name) for name in expected} == expected
    assert loaded.notes == ()


@pytest.mark.parametrize(
    "word", [w for w in kubeproxy.WORDS if w.unused], ids=lambda w: w.key or w.flag
)
def test_what_changes_nothing_is_noted(tmp_path: Path, word: kubeproxy.Word) -> None:
    samples = {
        "text": "x",
        "switch": True,
        "number": 7,
        "time": "7s",
        "list": ["x"],
        "any": {"x": 1},
    }
    if word.key:
        loaded = from_file(tmp_path, **{word.key.replace(".", "__"): samples[word.kind]})
        [note] = loaded.notes
        assert f"{word.key} is ignored: {word.unused}" in note
    if word.flag:
        value = {"switch": "true", "number": "7", "time": "7s"}.get(word.kind, "x")
        assert len(from_flags(f"--{word.flag}={value}").notes) == 1


REFUSED_FILES = [
    ({"mode": "kernelspace"}, "mode 'kernelspace' is none of"),
    ({"clusterCidr": "10.0.0.0/8"}, "clusterCidr is no setting"),
    ({"iptables__masquerade": True}, "iptables.masquerade is no setting"),
    ({"iptables": 5}, "iptables: expected keys and values"),
    ({"iptables__masqueradeAll": "yes"}, "neither true nor false"),
    ({"clusterCIDR": "10.0.0.0/99"}, "10.0.0.0/99"),
    ({"clusterCIDR": ["10.0.0.0/8"]}, "is not text"),
    ({"nodePortAddresses": "10.0.0.0/8"}, "is not a list"),
    ({"bindAddress": "localhost"}, "is not an address"),
    ({"iptables__minSyncPeriod": "soon"}, "is not a time such as 1m30s"),
    ({"iptables__minSyncPeriod": 5}, "is not a time such as 1m30s"),
    ({"detectLocalMode": "Guess"}, "'Guess' is none of"),
    ({"logging__verbosity": "high"}, "is not a number"),
    ({"healthzBindAddress": "host:port"}, "healthzBindAddress"),
]


@pytest.mark.parametrize(("said", "message"), REFUSED_FILES)
def test_what_a_file_may_not_say(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_file(tmp_path, **said)
    assert message in str(raised.value)
    # Each says where.
    assert "config.conf:" in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--cleanup", "svcdp rules remove"),
        ("--master=https://192.0.2.1", "kubeconfig"),
        ("--init-only", "leave it out"),
        ("--write-config-to=x", "svcdp check"),
        ("--no-such-flag", "kube-proxy has no flag --no-such-flag"),
        ("word", "'word' is no flag"),
        ("--cluster-cidr", "--cluster-cidr needs a value"),
        ("--masquerade-all=maybe", "neither true nor false"),
        ("--healthz-port=all", "is not a number"),
        ("--proxy-mode=userspace", "mode 'userspace' is none of"),
        ("--config=/no/such/file", "cannot read the config file"),
    ],
)
def test_what_flags_may_not_say(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_flags(line)
    assert message in str(raised.value)


def test_a_file_comes_before_flags_as_with_kube_proxy(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(KUBEADM.replace("options", "# options"))
    loaded = from_flags(f"--config {file} --cluster-cidr=10.9.0.0/16 -v4")
    assert loaded.config.pod_cidrs == ("10.244.0.0/16", "fd01::/48")
    assert loaded.config.log_level == "debug"
    assert loaded.notes[0] == "--cluster-cidr does not count beside --config, as with kube-proxy"
    with pytest.raises(ConfigError, match="svcdp rules remove"):
        from_flags(f"--config {file} --cleanup")


def test_a_file_of_ours_is_not_kube_proxys(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("apiVersion: svcdp.io/v1alpha1\nkind: NodeConfig\n")
    with pytest.raises(ConfigError, match="give it to `svcdp run --config`"):
        from_flags(f"--config={file}")
    file.write_text(f"apiVersion: {kubeproxy.API_VERSION}\nkind: NodeConfig\n")
    with pytest.raises(ConfigError, match="kind must be KubeProxyConfiguration"):
        load(str(file), environ={})


def test_settings_of_our_own_come_from_the_environment() -> None:
    environ = {"SVCDP_SCHEDULER": "mh", "SVCDP_NODE_NAME": "n2"}
    config = load(environ=environ, kube_proxy=["--hostname-override=n1"]).config
    assert (config.scheduler, config.node_name) == ("mh", "n2")
