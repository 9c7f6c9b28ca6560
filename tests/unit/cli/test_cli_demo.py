"""The demo's report, and who may run it."""

from __future__ import annotations

import os

import pytest

from svcdp.cli._demo.report import MethodResult, NameResult, PathResult, PhaseResult, Report
from svcdp.cli.group import run


@pytest.fixture
def report() -> Report:
    """One in which all is well."""
    kept = {"connections": 4, "requests": 100, "lost": 0, "moved": 0}
    return Report(
        paths=[PathResult("client", "ClusterIP web", "TCP", "::1", 80, {"b": 1, "a": 2}, 0)],
        names=[NameResult("web.default", "A", ["10.96.0.10"], "10.96.0.10")],
        environment={"WEB_SERVICE_PORT": "80"},
        methods=[MethodResult("DR", "client", "::2", 80, {"a": 3}, 0, {"::9": 3}, "::9")],
        phases=[PhaseResult("a and b", {"a": 5, "b": 6}, ["a", "b"])],
        load={"failed": 0, "errors": {}, "kept": kept, "changing": 9},
        queues=[{"queue": 100, "received": 7}],
        exit_status=0,
    )


def test_all_is_well(report: Report) -> None:
    assert report.ok
    assert report.plain()["ok"] is True
    text = report.text()
    assert "client   ClusterIP web   [::1]:80/TCP   3    0        a:2 b:1\n" in text
    assert "DR           client   [::2]:80   3    0        a:3         ::9           yes\n" in text
    assert "web.default   A      10.96.0.10   yes\n" in text
    assert "WEB_SERVICE_PORT            80\n" in text
    assert "new connections      20            0        -      -\n" in text
    assert text.endswith("Result: all is well")


def test_an_empty_report_is_no_success() -> None:
    assert not Report().ok


@pytest.mark.parametrize(
    "flaw",
    [
        "failed",
        "wrong server",
        "wrong client",
        "wrong name",
        "untold",
        "lost",
        "moved",
        "left",
        "exit",
    ],
)
def test_flaws_are_seen(report: Report, flaw: str) -> None:
    if flaw == "failed":
        report.paths[0].failed = 1
    elif flaw == "wrong server":
        report.phases[0].served["c"] = 1
    elif flaw == "wrong client":
        report.methods[0].seen["::8"] = 1
    elif flaw == "wrong name":
        report.names[0].answer.append("10.96.0.11")
    elif flaw == "untold":
        report.environment.clear()
    elif flaw == "left":
        report.left_behind.append("a rule")
    elif flaw == "exit":
        report.exit_status = 1
    else:
        report.load["kept"][flaw] = 1
    assert not report.ok
    assert report.text().endswith("Result: FAILED")


def test_it_needs_root(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(["demo"]) == 1
    assert capsys.readouterr().err == "error: the demo makes network namespaces: run it as root\n"
