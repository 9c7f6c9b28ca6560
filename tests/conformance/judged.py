"""What becomes of a flow, asked twice: of `explain`, and by packets through `process`."""

from __future__ import annotations

from typing import Any, NamedTuple

import wire

from svcdp import Dataplane, Settings, Verdict
from svcdp.kube import NodeContext, resolve

#: Packets sent, each of a connection of its own: round robin shows all of a few endpoints.
PACKETS = 6


class Outcome(NamedTuple):
    """Addresses of all who may serve, and whether they see a source other than the client's."""

    action: str
    endpoints: frozenset[str] = frozenset()
    masquerade: bool = False


def forward(*endpoints: str, masquerade: bool = False) -> Outcome:
    return Outcome("forward", frozenset(endpoints), masquerade)


DROP, REJECT, PASS = Outcome("drop"), Outcome("reject"), Outcome("pass")


class Judge:
    """A dataplane with what ``node`` owes to some objects."""

    def __init__(self, objects: list[dict[str, Any]], node: NodeContext) -> None:
        # All are told, however many are refused.
        self.dataplane = Dataplane(4096, seed=1, settings=Settings(answer_rate=0))
        self.dataplane.apply(resolve(objects, node))
        self.port = 40000  # none to masquerade with

    def outcome(
        self, client: str, address: str, port: int, protocol: str = "tcp", mark: int = 0
    ) -> Outcome:
        """What `explain` says; AssertionError unless packets fare the same."""
        said = self._explained(client, address, port, protocol, mark)
        seen = self._sent(client, address, port, protocol, mark)
        assert said == seen, (said, seen)
        return said

    def _explained(self, client: str, address: str, port: int, protocol: str, mark: int) -> Outcome:
        ends = [f"[{a}]" if ":" in a else a for a in (client, address)]
        flow = f"{protocol} {ends[0]}:4000 -> {ends[1]}:{port}"
        found = self.dataplane.explain(flow, mark)
        (masquerade,) = {each.masquerade for each in found.destinations} or {False}
        return Outcome(
            found.action, frozenset(each.address for each in found.destinations), masquerade
        )

    def _sent(self, client: str, address: str, port: int, protocol: str, mark: int) -> Outcome:
        outcomes = set()
        endpoints = set()
        for _ in range(PACKETS):
            self.port += 1
            packet = wire.packet(protocol, client, self.port, address, port, "S")
            result = self.dataplane.process(packet, mark=mark)
            action = Verdict(result.verdict).name.lower()
            masquerade = False
            if result.verdict == Verdict.FORWARD:
                sent = wire.read(bytes(result.packet))
                endpoints.add(sent.destination)
                masquerade = (sent.source, sent.source_port) != (client, self.port)
            outcomes.add((action, masquerade))
        ((action, masquerade),) = outcomes
        return Outcome(action, frozenset(endpoints), masquerade)
