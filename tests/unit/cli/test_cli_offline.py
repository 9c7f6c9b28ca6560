"""Verbs that need no daemon: trace and validate, on the example manifests."""

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


def test_trace_refuses_what_is_no_flow(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "somewhere", "-f", MANIFESTS]) == 2
    assert capsys.readouterr().err.startswith("error: flow 'somewhere': write it like")


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
