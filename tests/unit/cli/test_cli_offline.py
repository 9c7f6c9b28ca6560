"""Verbs that need no daemon: trace, replay and validate, on the example manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svcdp.cli.group import run

MANIFESTS = str(Path(__file__).parents[3] / "examples" / "manifests")


def trace(capsys: pytest.CaptureFixture[str], flow: str, *arguments: str) -> str:
    assert run(["trace", flow, "-f", MANIFESTS, "--node", "n1", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_trace_says_where_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    out = trace(capsys, "tcp 10.1.1.99:40000 -> 10.96.0.10:80")
    assert "Action:    forward\n" in out
    assert "Service:   default/web:http" in out
    assert "10.1.1.11:8080   2        masq     no\n" in out


def test_trace_json(capsys: pytest.CaptureFixture[str]) -> None:
    node = ["--addresses", "192.0.2.1", "--pod-cidrs", "10.1.0.0/16", "-o", "json"]
    answer = json.loads(trace(capsys, "udp 198.51.100.7:5000 -> 192.0.2.1:30007", *node))
    assert answer["action"] == "forward"
    assert answer["service"] == "default/echo:echo"
    assert [(d["address"], d["masquerade"]) for d in answer["destinations"]] == [
        ("10.1.1.11", True),
        ("10.1.1.12", True),
    ]
    answer = json.loads(trace(capsys, "udp 198.51.100.7:5000 -> 192.0.2.1:31000", *node))
    assert (answer["action"], answer["service"], answer["destinations"]) == ("pass", None, [])


def test_trace_by_all_that_decides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Zones, Pods that are told by their interface, and what was allocated."""

    def hinted(address: str, zone: str) -> dict[str, object]:
        return {"addresses": [address], "hints": {"forZones": [{"name": zone}]}}

    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.10", "ports": [{"port": 80}]},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": [hinted("10.1.1.1", "a"), hinted("10.1.1.2", "b")],
    }
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for each in (service, endpoints):
        (manifests / f"{each['kind']}.json").write_text(json.dumps(each))
    node = ["--addresses", "192.0.2.1", "--zone", "b", "--detect-local-mode", "BridgeInterface"]
    node += ["--pod-interface", "cni0", "--service-node-port-range", "31000-31000"]

    def traced(flow: str, *more: str) -> list[tuple[str, bool]]:
        assert run(["trace", flow, "-f", str(manifests), *node, *more, "-o", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return [(each["address"], each["masquerade"]) for each in found["destinations"]]

    flow = "tcp 10.1.9.9:4000 -> 10.96.0.10:80"
    assert traced(flow) == [("10.1.1.2", True)]
    assert traced(flow, "--mark", "0x80000") == [("10.1.1.2", False)]
    assert traced("tcp 10.1.9.9:4000 -> 192.0.2.1:31000") == [("10.1.1.2", True)]
    assert run(["trace", flow, "-f", str(manifests), *node, "--mark", "blue"]) == 2
    assert "'blue' is no number such as 0x80000" in capsys.readouterr().err


def test_trace_refuses_what_is_no_flow(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "somewhere", "-f", MANIFESTS]) == 2
    assert capsys.readouterr().err.startswith("error: flow 'somewhere': write it like")


def test_replay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    inet = pytest.importorskip("scapy.layers.inet")
    utils = pytest.importorskip("scapy.utils")
    syn = inet.IP(src="10.1.1.99", dst="10.96.0.10") / inet.TCP(sport=4000, dport=80, flags="S")
    other = inet.IP(src="10.1.1.99", dst="192.0.2.77") / inet.UDP(sport=1, dport=2)
    utils.wrpcap(str(tmp_path / "in.pcap"), [syn, other, syn])
    arguments = [str(tmp_path / "in.pcap"), "-f", MANIFESTS, "-w", str(tmp_path / "out.pcap")]
    assert run(["replay", *arguments]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["VERDICT", "REASON", "PACKETS"],
        ["PASS", "NO_SERVICE", "1"],
        ["FORWARD", "ESTABLISHED", "1"],
        ["FORWARD", "NEW", "1"],
    ]
    first, second, third = utils.rdpcap(str(tmp_path / "out.pcap"))
    assert first[inet.IP].dst in ("10.1.1.11", "10.1.1.12")
    assert first[inet.TCP].dport == 8080
    assert bytes(first) == bytes(third)
    assert second[inet.IP].dst == "192.0.2.77"
    assert run(["replay", *arguments, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["notIP"] == 0


def test_a_damaged_capture_leaves_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "in.pcap").write_bytes(b"\xd4\xc3\xb2\xa1\2\0\4\0" + bytes(12) + b"\x65\0\0\0cut")
    arguments = [str(tmp_path / "in.pcap"), "-f", MANIFESTS, "-w", str(tmp_path / "out.pcap")]
    assert run(["replay", *arguments]) == 2
    assert capsys.readouterr().err == "error: pcap record 1: its header is cut short\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in.pcap"]


def test_validate_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "-f", MANIFESTS]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "8 objects, 0 problems\n"


def test_validate_names_file_line_and_field(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(
        "apiVersion: v1\n"
        "kind: Service\n"
        "metadata: {name: web}\n"
        "spec:\n"
        "  clusterIP: 10.96.0.10\n"
        "  ports:\n"
        "    - port: 80\n"
        "    - port: 99999\n"
        "---\n"
        "apiVersion: v1\n"
        "kind: Service\n"
        "metadata: {name: other}\n"
        "spec: {clusterIP: nowhere, ports: [{port: 1}]}\n"
    )
    assert run(["validate", "-f", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path}/bad.yaml:8: ")
    assert "ports[1].port" in lines[0]
    assert "nowhere" in lines[1]


def test_validate_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "-f", "/nonexistent"]) == 1
    assert capsys.readouterr().err.startswith("error: /nonexistent")
