"""The result of a demo: what was asked, who answered, and whether all was well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from svcdp.cli.printers import endpoint, table

__all__ = ["MethodResult", "NameResult", "PathResult", "PhaseResult", "Report"]


@dataclass
class PathResult:
    """Requests from one place to one address."""

    source: str
    target: str
    protocol: str
    address: str
    port: int
    served: dict[str, int]
    failed: int

    @property
    def ok(self) -> bool:
        return bool(self.served) and not self.failed


@dataclass
class NameResult:
    """What DNS said of a name."""

    name: str
    kind: str
    answer: list[str]
    expected: str

    @property
    def ok(self) -> bool:
        return self.answer == [self.expected]


@dataclass
class MethodResult:
    """Requests that were forwarded by one method, and the client that the servers saw."""

    method: str
    source: str
    address: str
    port: int
    served: dict[str, int]
    failed: int
    seen: dict[str, int]
    expected: str

    @property
    def ok(self) -> bool:
        return set(self.seen) == {self.expected} and not self.failed


@dataclass
class PhaseResult:
    """New connections between two changes of the endpoints, and who may have served them."""

    change: str
    served: dict[str, int]
    expected: list[str]

    @property
    def ok(self) -> bool:
        return set(self.served) == set(self.expected)


@dataclass
class Report:
    """All that a demo found."""

    paths: list[PathResult] = field(default_factory=list)
    names: list[NameResult] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """What a container is told of a Service."""
    methods: list[MethodResult] = field(default_factory=list)
    phases: list[PhaseResult] = field(default_factory=list)
    load: dict[str, Any] = field(default_factory=dict)
    """Under load: requests ``failed``, ``errors``, ``kept`` connections, and new ones during
    ``changing``."""
    queues: list[dict[str, Any]] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    exit_status: int | None = None
    """Of the daemon."""

    @property
    def ok(self) -> bool:
        kept = self.load.get("kept", {})
        return (
            bool(self.paths and self.names and self.environment and self.phases)
            and all(path.ok for path in self.paths)
            and all(name.ok for name in self.names)
            and all(method.ok for method in self.methods)
            and all(phase.ok for phase in self.phases)
            and not (self.load["failed"] or kept["lost"] or kept["moved"] or self.left_behind)
            and self.exit_status == 0
        )

    def plain(self) -> dict[str, Any]:
        """For ``-o json``."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """For people."""
        parts = [
            table(
                ["FROM", "TO", "ADDRESS", "OK", "FAILED", "SERVED BY"],
                [
                    [
                        path.source,
                        path.target,
                        f"{endpoint(path.address, path.port)}/{path.protocol}",
                        sum(path.served.values()),
                        path.failed,
                        _who(path.served),
                    ]
                    for path in self.paths
                ],
            ),
            table(
                ["NAME", "TYPE", "ANSWER", "AS EXPECTED"],
                [
                    [
                        name.name,
                        name.kind,
                        " ".join(name.answer) or "nothing",
                        "yes" if name.ok else f"NO: {name.expected}",
                    ]
                    for name in self.names
                ],
            ),
            table(["ENVIRONMENT OF CONTAINERS", "VALUE"], list(self.environment.items())),
            table(
                [
                    "FORWARDING",
                    "FROM",
                    "TO",
                    "OK",
                    "FAILED",
                    "SERVED BY",
                    "SERVERS SAW",
                    "AS EXPECTED",
                ],
                [
                    [
                        result.method,
                        result.source,
                        endpoint(result.address, result.port),
                        sum(result.served.values()),
                        result.failed,
                        _who(result.served),
                        " ".join(sorted(result.seen)) or "nobody",
                        "yes" if result.ok else f"NO: {result.expected}",
                    ]
                    for result in self.methods
                ],
            ),
            table(
                ["ENDPOINTS UNDER LOAD", "NEW CONNECTIONS", "SERVED BY", "AS EXPECTED"],
                [
                    [
                        phase.change,
                        sum(phase.served.values()),
                        _who(phase.served),
                        "yes" if phase.ok else "NO: " + " ".join(phase.expected),
                    ]
                    for phase in self.phases
                ],
            ),
            self._load(),
            table(
                [name.upper().replace("_", " ") for name in self.queues[0]] if self.queues else [],
                [list(queue.values()) for queue in self.queues],
            ),
            "Left behind after the daemon stopped: " + ("; ".join(self.left_behind) or "nothing"),
            "Result: " + ("all is well" if self.ok else "FAILED"),
        ]
        return "\n\n".join(parts)

    def _load(self) -> str:
        kept = self.load["kept"]
        steady = sum(sum(phase.served.values()) for phase in self.phases)
        new = steady + self.load["changing"]
        rows = [
            ["new connections", new, self.load["failed"], "-", "-"],
            [
                f"{kept['connections']} kept connections",
                kept["requests"],
                "-",
                kept["lost"],
                kept["moved"],
            ],
        ]
        text = table(["LOAD", "REQUESTS OK", "FAILED", "LOST", "MOVED"], rows)
        errors = [f"  {count} x {error}" for error, count in self.load["errors"].items()]
        return "\n".join([text, *errors])


def _who(served: Mapping[str, int]) -> str:
    return " ".join(f"{name}:{served[name]}" for name in sorted(served)) or "nobody"
