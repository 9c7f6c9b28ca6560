"""``svcdp top``: rates from two looks, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Self

import pytest

from svcdp.cli import top
from svcdp.cli.group import run


def item(service: str, address: str, virtual: str = "10.96.0.1", **counters: int) -> dict[str, Any]:
    names = ("active", "inactive", "connections", "packetsIn", "packetsOut", "bytesIn", "bytesOut")
    return {
        "namespace": "shop",
        "service": service,
        "protocol": "tcp",
        "virtual": virtual,
        "virtualPort": 80,
        "address": address,
        "port": 8080,
        **dict.fromkeys(names, 0),
        **counters,
    }


NAME = "a-name-that-is-as-long-as-names-of-services-are:https"
BEFORE = [
    item("web:http", "10.1.0.1", packetsIn=100, bytesIn=1000, connections=5),
    item("web:http", "fd00::1", virtual="fd96::1", packetsIn=7),
    item("db", "10.1.0.2", packetsIn=900),
]
AFTER = [
    item(
        "web:http",
        "10.1.0.1",
        active=3,
        inactive=1,
        packetsIn=120,
        packetsOut=10,
        bytesIn=2_001_000,
        bytesOut=500_000,
        connections=15,
    ),
    item("web:http", "fd00::1", virtual="fd96::1", active=2, packetsIn=7),
    item("db", "10.1.0.2", packetsIn=4, active=1),  # another one at its place
    item("new", "10.1.0.3", packetsIn=6, connections=2),
]


class FakeDaemon:
    """Answers with one list after the other; time goes on by two seconds each."""

    def __init__(self, *lists: list[dict[str, Any]]) -> None:
        self.lists = list(lists)
        self.asked: list[Any] = []
        self.now = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, what: str, **fields: Any) -> Iterator[dict[str, Any]]:
        assert what == "endpoints"
        self.asked.append(fields)
        return iter(self.lists.pop(0))

    def sleep(self, seconds: float) -> None:
        if not self.lists:
            raise KeyboardInterrupt
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    daemon = FakeDaemon(BEFORE, AFTER)
    monkeypatch.setattr(top, "AdminClient", lambda path: daemon)
    monkeypatch.setattr(top, "time", daemon)
    return daemon


def test_one_table(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--once", "-n", "shop"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAMESPACE   SERVICE    ACTIVE   INACTIVE   CONN/S   PACKETS/S   BYTES/S",
        "shop        web:http   5        1          5        15          1.2M",
        "shop        new        0        0          1        3           0",
        "shop        db         1        0          0        2           0",
    ]
    assert daemon.asked == [{"namespace": "shop"}] * 2


def test_endpoints_by_name(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--once", "--endpoints", "--sort", "name"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines] == [
        "ENDPOINT",
        "10.1.0.2:8080",
        "10.1.0.3:8080",
        "10.1.0.1:8080",
        "[fd00::1]:8080",
    ]


def test_json(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "--once", "-o", "json", "--sort", "active"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    first = json.loads(line)[0]
    assert first == {
        "namespace": "shop",
        "service": "web:http",
        "endpoint": "",
        "active": 5,
        "inactive": 1,
        "connections": 5.0,
        "packets": 15.0,
        "bytes": 1250000.0,
    }


def test_a_terminal_is_refreshed_in_place_and_never_overfilled(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "3")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    daemon.lists += [AFTER]
    assert run(["top"]) == 130
    screens = capsys.readouterr().out.split(top.HOME + top.ERASE)[1:]
    assert len(screens) == 2
    for screen in screens:
        lines = screen.splitlines()
        assert len(lines) == 2
        assert all(len(line) <= 30 for line in lines)


@pytest.mark.parametrize(
    ("width", "options", "names"),
    [
        (80, [], ["shop", NAME[:17]]),
        (100, ["--endpoints"], ["shop", NAME[:15], "10.123.101.102:8080"]),
        (62, [], ["shop", NAME[:4]]),
    ],
)
def test_a_narrow_terminal_cuts_names_and_no_numbers(
    daemon: FakeDaemon,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    options: list[str],
    names: list[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    before = item(NAME, "10.123.101.102")
    daemon.lists = [[before], [before | {"bytesIn": 2_468_000}]]
    assert run(["top", *options]) == 130
    header, line = capsys.readouterr().out.removeprefix(top.HOME + top.ERASE).splitlines()
    assert header.endswith("   ACTIVE   INACTIVE   CONN/S   PACKETS/S   BYTES/S")
    assert line.split() == [*names, "0", "0", "0", "0", "1.2M"]
    assert len(header) <= width


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.0k"), (9_940, "9.9k"), (9_960, "10k"), (2.5e9, "2.5G")],
)
def test_short_numbers(number: float, text: str) -> None:
    assert top._short(number) == text
