"""Capturing by nft: one table, ``inet svcdp``.

The chains do what those of :mod:`svcdp.rules.iptables` do in raw and mangle, NF_REPEAT
included, but there is no accept: in nftables one table cannot overrule the drop of another.
On a host that filters forwarded packets, its own rules have to let through what svcdp
rewrote: ``meta mark & 0x00100000 != 0 accept`` with the ``forward_mark``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from svcdp.errors import RulesError
from svcdp.rules.backend import KernelBackend
from svcdp.rules.plan import CapturePlan, Element, Kind, family_of
from svcdp.rules.sysctl import Guard
from svcdp.rules.tools import run

__all__ = ["NftBackend"]

TABLE = "inet svcdp"
KINDS: dict[Kind, str] = {
    "tunnel": "to a service behind tunnels",
    "virtual": "to a service",
    "real": "from an endpoint",
}
ADDRESS = {4: "ipv4_addr", 6: "ipv6_addr"}
PROTOCOL = {4: "ip", 6: "ip6"}
ICMP_ERRORS = (
    "icmp type { destination-unreachable, time-exceeded, parameter-problem }",  # RFC 792
    "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
)


def _rule(text: str, comment: str) -> str:
    return f'{text} comment "svcdp: {comment}"'


DEFRAGMENT = tuple(
    _rule(
        f"{ip} daddr {nowhere} meta l4proto udp tproxy {ip} to :1",
        "puts fragments together before all this",
    )
    for ip, nowhere in (("ip", "0.0.0.0"), ("ip6", "::"))
)
"""Never matches; what counts is that tproxy turns this on, and connection tracking not."""


class NftBackend(KernelBackend):
    """Everything in one table, each change one transaction."""

    name = "nft"

    def _install(self, plan: CapturePlan, guard: Guard) -> None:
        _load(self._script(plan, guard))

    def _uninstall(self) -> None:
        _load(f"table {TABLE}\ndelete table {TABLE}\n")

    def _is_called(self) -> bool:
        return all(_list("chain", f"{TABLE} {hook}") for hook in ("prerouting", "output"))

    def _change(self, added: Collection[Element], removed: Collection[Element]) -> None:
        _load(_changes("add", added) + _changes("delete", removed))

    def _script(self, plan: CapturePlan, guard: Guard) -> str:
        lines = [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]
        elements = _by_set(plan.elements)
        for name, shape in _sets():
            lines += [f"\tset {name} {{", f"\t\ttype {shape}"]
            if name in elements:
                lines.append(f"\t\telements = {{ {', '.join(elements[name])} }}")
            lines.append("\t}")
        lines += _chain(
            "passed",
            [
                _rule(
                    f"meta mark set meta mark & {plan.pass_mark ^ 0xFFFFFFFF:#010x}", "forget that"
                )
            ],
        )
        lines += _chain("rewritten", [_rule("notrack", "conntrack saw half of it")])
        lines += _chain("capture", [*_untouchable(guard), *_captures(plan)])
        martians, reverse = _martians(guard), _reverse_path(guard)
        seen = [
            _rule(f"{_seen(plan.pass_mark)} goto passed", "seen, not ours"),
            _rule(f"{_seen(plan.forward_mark)} goto rewritten", "rewritten"),
        ]
        check = []
        for name, rules in (("martians", martians), ("reverse", reverse)):
            if rules:
                lines += _chain(name, rules)
                text = "as the kernel does without svcdp"
                check.append(_rule(f"meta nfproto ipv4 jump {name}", text))
        capture = [_rule("jump capture", "new to us")]
        pods = []
        if plan.pod_interface:
            name = plan.pod_interface.replace("+", "*")
            set_mark = f"meta mark set meta mark | {plan.pod_mark:#010x}"
            pods = [_rule(f'iifname "{name}" {set_mark}', "of a Pod")]
        incoming = seen + check + pods + capture + list(DEFRAGMENT)
        for hook, rules in (("prerouting", incoming), ("output", seen + capture)):
            base = f"type filter hook {hook} priority raw; policy accept;"
            lines += _chain(hook, [base, *rules])
        if marked := list(_marked(plan)):
            for hook in ("prerouting", "output"):
                base = f"type filter hook {hook} priority mangle + 10; policy accept;"
                lines += _chain(f"{hook}_marked", [base, *marked])
        return "\n".join([*lines, "}", ""])

    def _show(self) -> str:
        return _list("table", TABLE)


def _list(kind: str, name: str) -> str:
    """As nft prints it; empty: there is none."""
    try:
        return run(["nft", "list", kind, *name.split()])
    except RulesError as error:
        if "No such file" in error.stderr:
            return ""
        raise


def _load(script: str) -> None:
    if script:
        run(["nft", "-f", "-"], script)


def _seen(mark: int) -> str:
    return f"meta mark & {mark:#010x} != 0"


def _set_name(kind: Kind, family: int, *, whole: bool) -> str:
    return f"{kind}{'_all' if whole else ''}{family}"


def _sets() -> Iterator[tuple[str, str]]:
    """Names and types: of addresses with a port, and of whole addresses."""
    for kind in KINDS:
        for family, address in ADDRESS.items():
            yield _set_name(kind, family, whole=False), f"{address} . inet_proto . inet_service"
            yield _set_name(kind, family, whole=True), address


def _chain(name: str, rules: Iterable[str]) -> list[str]:
    return [f"\tchain {name} {{", *(f"\t\t{rule}" for rule in rules), "\t}"]


def _queue(plan: CapturePlan, kind: Kind) -> str:
    first, last = plan.queues_of(kind)
    numbers = f"{first}" if first == last else f"{first}-{last}"
    return f"queue num {numbers}{' bypass' if plan.bypass else ''}"


def _untouchable(guard: Guard) -> list[str]:
    """See :mod:`svcdp.rules.iptables`."""
    if not guard.tracked:
        return []
    match = "meta l4proto { icmp, ipv6-icmp } ct state related ct status & confirmed == 0"
    return [_rule(f"{match} return", "about a connection that is new to conntrack")]


def _captures(plan: CapturePlan) -> list[str]:
    queue = _queue(plan, "virtual")
    rules = []
    for address, number in plan.hosted:
        ip = PROTOCOL[family_of(address)]
        for side in ("d", "s"):
            match = f"{ip} {side}addr {address} meta l4proto {{ tcp, udp }} th {side}port {number}"
            rules.append(_rule(f"{match} return", "served by this host"))
    rules += [_rule(f"{match} {queue}", "may be about a connection") for match in ICMP_ERRORS]
    for kind, text in KINDS.items():
        side = "s" if kind == "real" else "d"
        for family, ip in PROTOCOL.items():
            port = f"{ip} {side}addr . meta l4proto . th {side}port"
            for whole, match in ((False, port), (True, f"{ip} {side}addr")):
                name = _set_name(kind, family, whole=whole)
                rules.append(_rule(f"{match} @{name} {_queue(plan, kind)}", text))
    for network in plan.networks:
        ip = PROTOCOL[family_of(network.cidr)]
        rules.append(_rule(f"{ip} daddr {network.cidr} {queue}", "no service"))
    return rules


def _marked(plan: CapturePlan) -> Iterator[str]:
    """Rules that capture by mark, behind those of others that set it. Maybe none."""
    if plan.marks:
        yield _rule(f"{_seen(plan.forward_mark)} return", "rewritten")
    for mark in plan.marks:
        version = "ipv4" if mark.family == 4 else "ipv6"
        match = f"meta nfproto {version} meta mark & {plan.free_marks:#010x} == {mark.mark:#x}"
        # So that the verdict is to go on.
        seen = f"meta mark set meta mark | {plan.pass_mark:#010x}"
        yield _rule(f"{match} {seen} {_queue(plan, mark.kind)}", KINDS[mark.kind])


def _martians(guard: Guard) -> list[str]:
    """See :mod:`svcdp.rules.iptables`. ``oif missing`` is nft's word for rpfilter --loose."""
    if not guard.martians:
        return []
    rules = [_rule(f'iifname "{i}" return', "had accept_local") for i in guard.trusted]
    drop = 'iifname != "lo" fib saddr type local fib saddr . iif oif missing drop'
    return [*rules, _rule(drop, "accept_local=0")]


def _reverse_path(guard: Guard) -> list[str]:
    # To an address of the interface itself no route leads out; strict has no objection to it.
    drop = "fib saddr . iif type != local fib saddr . iif oif missing drop"
    rules = [_rule(f'iifname "{name}" {drop}', "rp_filter=1") for name in guard.strict]
    if guard.strict_default:
        rules += [_rule(f'iifname "{name}" return', "had no rp_filter=1") for name in guard.loose]
        rules.append(_rule(drop, "rp_filter=1"))
    return rules


def _by_set(elements: Iterable[Element]) -> dict[str, list[str]]:
    """The elements' texts, by the name of their set."""
    found: dict[str, list[str]] = {}
    for each in sorted(elements):
        text = f"{each.address} . {each.protocol} . {each.port}" if each.protocol else each.address
        name = _set_name(each.kind, family_of(each.address), whole=not each.protocol)
        found.setdefault(name, []).append(text)
    return found


def _changes(verb: str, elements: Collection[Element]) -> str:
    return "".join(
        f"{verb} element {TABLE} {name} {{ {', '.join(texts)} }}\n"
        for name, texts in _by_set(elements).items()
    )
