"""Capturing by nft: one table, ``inet svcdp``.

The chains do what those of :mod:`svcdp.rules.iptables` do in the raw table, NF_REPEAT
included, but there is no accept: in nftables one table cannot overrule the drop of another.
On a host that filters forwarded packets, its own rules have to let through what svcdp
rewrote: ``meta mark & 0x00100000 != 0 accept`` with the ``forward_mark``.
"""

from __future__ import annotations

from collections.abc import Iterable

from svcdp.dataplane import Captures
from svcdp.errors import RulesError
from svcdp.rules.backend import KernelBackend
from svcdp.rules.plan import CapturePlan, Element, family_of
from svcdp.rules.sysctl import Guard
from svcdp.rules.tools import run

__all__ = ["NftBackend"]

TABLE = "inet svcdp"
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

    def _update(self, added: Captures, removed: Captures) -> None:
        _load(_changes("add", added) + _changes("delete", removed))

    def _script(self, plan: CapturePlan, guard: Guard) -> str:
        lines = [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]
        for kind, elements in (("virtual", plan.virtual), ("real", plan.real)):
            for family in ADDRESS:
                lines += _set(family, kind, elements)
        lines += _chain(
            "passed",
            [
                _rule(
                    f"meta mark set meta mark & {plan.pass_mark ^ 0xFFFFFFFF:#010x}", "forget that"
                )
            ],
        )
        lines += _chain("rewritten", [_rule("notrack", "conntrack saw half of it")])
        lines += _chain("capture", _captures(plan))
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
        incoming = seen + check + capture + list(DEFRAGMENT)
        for hook, rules in (("prerouting", incoming), ("output", seen + capture)):
            base = f"type filter hook {hook} priority raw; policy accept;"
            lines += _chain(hook, [base, *rules])
        return "\n".join([*lines, "}", ""])

    def _show(self) -> str:
        try:
            return run(["nft", "list", "table", *TABLE.split()])
        except RulesError as error:
            if "No such file" in error.stderr:
                return ""
            raise


def _load(script: str) -> None:
    if script:
        run(["nft", "-f", "-"], script)


def _seen(mark: int) -> str:
    return f"meta mark & {mark:#010x} != 0"


def _set(family: int, kind: str, elements: Iterable[Element]) -> list[str]:
    lines = [f"\tset {kind}{family} {{", f"\t\ttype {ADDRESS[family]} . inet_proto . inet_service"]
    if texts := _texts(family, elements):
        lines.append(f"\t\telements = {{ {', '.join(texts)} }}")
    return [*lines, "\t}"]


def _chain(name: str, rules: Iterable[str]) -> list[str]:
    return [f"\tchain {name} {{", *(f"\t\t{rule}" for rule in rules), "\t}"]


def _captures(plan: CapturePlan) -> list[str]:
    first, last = plan.queues
    queue = f"queue num {first}" if first == last else f"queue num {first}-{last}"
    if plan.bypass:
        queue += " bypass"
    rules = [_rule(f"{match} {queue}", "may be about a connection") for match in ICMP_ERRORS]
    for family, ip in PROTOCOL.items():
        to = f"{ip} daddr . meta l4proto . th dport @virtual{family}"
        back = f"{ip} saddr . meta l4proto . th sport @real{family}"
        rules.append(_rule(f"{to} {queue}", "to a service"))
        rules.append(_rule(f"{back} {queue}", "from an endpoint"))
    return rules


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


def _texts(family: int, elements: Iterable[Element]) -> list[str]:
    return [
        f"{address} . {protocol} . {port}"
        for protocol, address, port in sorted(elements)
        if family_of(address) == family
    ]


def _changes(verb: str, captures: Captures) -> str:
    return "".join(
        f"{verb} element {TABLE} {kind}{family} {{ {', '.join(texts)} }}\n"
        for kind, elements in (("virtual", captures.virtual), ("real", captures.real))
        for family in ADDRESS
        if (texts := _texts(family, elements))
    )
