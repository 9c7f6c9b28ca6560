"""Why a flow goes where it goes: the tables read aloud, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from svcdp.errors import ConfigError
from svcdp.records import (
    FTP_PORT,
    Endpoint,
    check_address,
    check_key,
    check_port,
    is_ftp,
    parse_address,
)
from svcdp.status import Connection
from svcdp.types import DestinationSpec, Flow, ServiceSpec, Verdict

__all__ = ["Explanation", "PossibleDestination", "parse_flow"]

#: What `Core.inspect` has as the scheduler's choice when nobody may serve.
NOBODY = -1

_FLOW = re.compile(
    r"\s*(?P<protocol>\w+)\s+(?P<source>\S+):(?P<source_port>\d+)"
    r"\s*->\s*(?P<destination>\S+):(?P<destination_port>\d+)\s*"
)


@dataclass(frozen=True, slots=True)
class PossibleDestination:
    """Where a flow could be sent now, and whether it would be masqueraded."""

    address: str
    port: int
    weight: int
    method: str
    masquerade: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would happen to a flow, and each rule that led there.

    ``action`` is forward, pass, drop or reject. ``destinations`` are all that could be picked,
    ``picked`` the one of them that the flow would get, where that can be told: of a known
    connection, a persistent client, and schedulers that go by the load, by a hash or by the
    address (not round robins, those that draw, and those in Python). A flow has no Call-ID: of a
    service with persistence by SIP's calls it is told where the first packet of a new call goes.
    """

    flow: Flow
    action: str
    service: ServiceSpec | None
    destinations: tuple[PossibleDestination, ...]
    reasons: tuple[str, ...]
    picked: PossibleDestination | None = None

    def __str__(self) -> str:
        lines = [f"{self.flow}: {self.action}"]
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [
            f"  -> {d.address} port {d.port} weight {d.weight} {d.method}"
            + (" masquerade" if d.masquerade else "")
            for d in self.destinations
        ]
        return "\n".join(lines)


def parse_flow(text: str) -> Flow:
    """A flow from ``"tcp 192.0.2.4:40000 -> 10.96.0.10:80"`` (IPv6 in brackets). ConfigError."""
    match = _FLOW.fullmatch(text)
    if not match:
        raise ConfigError(
            f"flow {text!r}: write it like 'tcp 192.0.2.4:40000 -> 10.96.0.10:80', IPv6"
            " addresses in brackets"
        )
    return normal_flow(
        Flow(
            match["protocol"].lower(),
            match["source"].removeprefix("[").removesuffix("]"),
            int(match["source_port"]),
            match["destination"].removeprefix("[").removesuffix("]"),
            int(match["destination_port"]),
        )
    )


def normal_flow(flow: Flow) -> Flow:
    if flow.protocol not in ("tcp", "udp", "sctp"):
        raise ConfigError(f"flow {flow}: protocol {flow.protocol!r} is none of tcp, udp, sctp")
    destination, destination_port, protocol = check_key(
        flow.destination, flow.destination_port, flow.protocol
    )
    source = check_address(flow.source, "flow")
    if source.version != parse_address(destination).version:
        raise ConfigError(f"flow {flow}: source and destination are of different IP families")
    return Flow(
        protocol, source.text, check_port(flow.source_port, "flow"), destination, destination_port
    )


def explain_known(
    flow: Flow,
    spec: ServiceSpec | None,
    connection: Connection,
    is_reply: bool,
    gone: Verdict | None,
) -> Explanation:
    """``gone``: the verdict where its destination is."""
    if gone is not None:
        action = gone.name.lower()
        reason = f"the destination of its known connection was removed: the service {action}s these"
        return Explanation(flow, action, spec, (), (reason,))
    masquerade = (connection.source, connection.source_port) != (
        connection.client,
        connection.client_port,
    )
    destinations = spec.destinations if spec is not None else ()
    # A destination that has left its service has no weight.
    weight = next(
        (
            member.weight
            for member in destinations
            if member.address == connection.destination
            and (member.method != "masq" or member.port in (0, connection.destination_port))
        ),
        0,
    )
    direction = "a reply of" if is_reply else "a packet of"
    reason = f"{direction} a known connection in state {connection.state}: it stays where it is"
    picked = PossibleDestination(
        connection.destination,
        connection.destination_port,
        weight,
        connection.method,
        masquerade,
    )
    return Explanation(flow, "forward", spec, (picked,), (reason,), picked)


def _is_ftp_data(spec: ServiceSpec, flow: Flow) -> bool:
    """Whether a flow for another port comes to the service because it is FTP's."""
    return is_ftp(spec) and flow.destination_port != FTP_PORT


def _port_at(member: DestinationSpec, spec: ServiceSpec, flow: Flow) -> int:
    """The port at which a destination gets the flow."""
    if member.method != "masq" or member.port == 0 or _is_ftp_data(spec, flow):
        return flow.destination_port
    return member.port


def explain_new(
    flow: Flow,
    spec: ServiceSpec,
    order: list[Endpoint],
    overloaded: Collection[Endpoint],
    ejected: Collection[Endpoint],
    rule_index: int,
    member: int,
    choice: int,
    bypass: bool,
) -> Explanation:
    """``order`` is that of the core, in which ``member`` and ``choice`` count, and has all who may
    serve: see `Core.inspect`; ``bypass``: the setting cache_bypass.
    """
    reasons = [f"service {spec}: {len(spec.destinations)} destinations"]
    if rule_index < 0:
        reasons.append(f"no source rule of the service admits {flow.source}")
        return Explanation(flow, "drop", spec, (), tuple(reasons))
    rule = spec.rules[rule_index]
    admitted = f"in {', '.join(rule.sources)}" if rule.sources else "any source"
    if rule.mark:
        admitted += f" with mark {rule.mark:#x}"
    reasons.append(
        f"source rule {rule_index + 1} ({admitted}): "
        + ("masquerade" if rule.masquerade else "the client's address is kept")
        + ("" if rule.endpoints is None else f"; {len(order)} of the destinations serve it")
    )
    serving = frozenset(order)
    members = {(m.address, m.port): m for m in spec.destinations if (m.address, m.port) in serving}
    # Whom lblc knows for an address goes on serving it.
    passed_over = set(overloaded)
    if spec.scheduler == "lblc" and choice >= 0:
        passed_over.discard(order[choice])
    candidates = [
        member
        for endpoint, member in members.items()
        if member.weight > 0 and endpoint not in passed_over and spec.scheduler != "none"
    ]
    answering = [each for each in candidates if (each.address, each.port) not in ejected]
    if candidates and not answering:
        reasons.append("none of them answered lately: all are asked again")
    elif len(answering) < len(candidates):
        reasons.append(f"{len(candidates) - len(answering)} that did not answer are passed over")
        candidates = answering
    if member >= 0:
        bound = order[member]
        candidates = [members[bound]]
        reasons.append(f"the client is persistent to {bound[0]} port {bound[1]}")
    nobody = "no destination with a weight that is not overloaded"
    if candidates and member < 0 and choice == NOBODY:
        candidates = []
        nobody = f"scheduler {spec.scheduler} has none for this flow"
    if not candidates and bypass and spec.protocol == "fwmark":
        reasons.append("nobody to serve: to where the client meant (cache_bypass)")
        return Explanation(flow, "forward", spec, (), tuple(reasons))
    if not candidates and _is_ftp_data(spec, flow):
        reasons.append("nobody to serve: data ports of FTP are left alone then")
        return Explanation(flow, "pass", spec, (), tuple(reasons))
    if not candidates:
        reasons.append(f"nobody to serve: {nobody}; {rule.on_empty}")
        action = "drop" if rule.on_empty == "drop" else "reject"
        return Explanation(flow, action, spec, (), tuple(reasons))
    if spec.persistence_engine:
        reasons.append("a packet of a known call (Call-ID) goes where the call is")
    if member < 0:
        reasons.append(f"scheduler {spec.scheduler} picks among {len(candidates)}")
    hairpin = spec.masquerade_address is not None
    possible = {
        (m.address, m.port): PossibleDestination(
            m.address,
            _port_at(m, spec, flow),
            m.weight,
            m.method,
            m.method == "masq" and (rule.masquerade or (hairpin and m.address == flow.source)),
        )
        for m in candidates
    }
    picked = None
    if member >= 0 or choice >= 0:
        endpoint = order[member if member >= 0 else choice]
        picked = possible.get(endpoint)  # None: others came first, and it is overloaded now
        if picked is not None and member < 0:
            reasons.append(f"it picks {endpoint[0]} port {endpoint[1]} now")
    dropped = [p for p in ([picked] if picked else possible.values()) if p.masquerade]
    if dropped and not hairpin:
        no_address = "masquerade is asked for, and the service has no address for it"
        if picked or len(dropped) == len(possible):
            reasons.append(no_address)
            return Explanation(flow, "drop", spec, (), tuple(reasons))
        names = ", ".join(f"{p.address} port {p.port}" for p in dropped)
        reasons.append(f"dropped instead if the pick is {names}: {no_address}")
    if any(p.masquerade for p in possible.values()) and not rule.masquerade:
        reasons.append("a client that reaches itself is masqueraded (hairpin)")
    return Explanation(flow, "forward", spec, tuple(possible.values()), tuple(reasons), picked)
