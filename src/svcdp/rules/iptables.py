"""Capturing by iptables, ip6tables and ipset.

::

    raw PREROUTING, OUTPUT    seen and passed   -> clear that mark, go on
                              seen, rewritten   -> notrack, go on
                              martian           -> drop (PREROUTING, IPv4: see svcdp.rules.sysctl)
                              ICMP error of the host's own about what it tracks -> go on
                              ICMP error, or in the sets -> NFQUEUE
    mangle PREROUTING, OUTPUT firewall mark of a service -> NFQUEUE
    filter FORWARD, INPUT     seen, rewritten   -> accept

The queue's verdict is NF_REPEAT with a mark: the packet walks the raw chain again, now as
"seen". So those that were rewritten, and only those, are exempt from connection tracking
(which would see half-translated connections, and INVALID packets), and rules that others have
in raw still see them. The mark also lets them through a FORWARD chain that drops what it does
not know. Fragments do not come here: the kernel puts them together before raw.

Firewall marks are looked at last in mangle, where people set them; the chain is there only while
a service has one. A packet goes to the queue marked as seen, so that its verdict is to go on:
the rules of others must not be walked again, they would set the mark again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import product

from svcdp.rules import ipset
from svcdp.rules.backend import KernelBackend
from svcdp.rules.plan import CapturePlan, Element, Kind, family_of
from svcdp.rules.sysctl import Guard
from svcdp.rules.tools import run

__all__ = ["IptablesBackend"]

TOOLS = {4: "iptables", 6: "ip6tables"}
HOOKS = {
    "filter": ("FORWARD", "INPUT"),
    "mangle": ("PREROUTING", "OUTPUT"),
    "raw": ("PREROUTING", "OUTPUT"),
}
"""Where our chains are called from. The filter table comes first: it is of no use alone, and
does no harm."""
CALL = {"filter": "-I", "mangle": "-A", "raw": "-I"}  # first, or last in the hook

PREFIX = "SVCDP-"
ICMP_ERRORS = {
    4: [f"-p icmp -m icmp --icmp-type {kind}" for kind in (3, 11, 12)],  # RFC 792
    6: [f"-p ipv6-icmp -m icmp6 --icmpv6-type {kind}" for kind in (1, 2, 3, 4)],  # RFC 4443
}
CAPTURED: dict[Kind, str] = {
    "tunnel": "to a service behind tunnels",
    "virtual": "to a service",
    "real": "from an endpoint",
}


class IptablesBackend(KernelBackend):
    """Rules in chains of our own, called from the top of the built-in ones.

    Works with both kinds of iptables, nf_tables and legacy. Each table of each IP version is
    one transaction.
    """

    name = "iptables"

    def _install(self, plan: CapturePlan, guard: Guard) -> None:
        ipset.load(ipset.full(plan.elements))
        for family, tool in TOOLS.items():
            script = ""
            for table in HOOKS:
                rules = _rules(table, family, plan, guard)
                script += _table(table, _found(tool, table), rules)
            _restore(tool, script)

    def _uninstall(self) -> None:
        for tool in TOOLS.values():
            script = ""
            for table in HOOKS:
                script += _table(table, _found(tool, table), {})
            _restore(tool, script)
        ipset.destroy()

    def _is_called(self) -> bool:
        return all(
            any(line.endswith(f"-j {PREFIX}{hook}") for line in found)
            for tool in TOOLS.values()
            for table in ("filter", "raw")  # mangle has rules only for firewall marks
            for found in [_found(tool, table)]
            for hook in HOOKS[table]
        )

    def _change(self, added: Collection[Element], removed: Collection[Element]) -> None:
        ipset.update(added, removed)

    def _script(self, plan: CapturePlan, guard: Guard) -> str:
        parts = ["# ipset -exist restore\n", ipset.full(sorted(plan.elements))]
        for family, tool in TOOLS.items():
            parts.append(f"# {tool}-restore --noflush\n")
            parts += [_table(t, [], _rules(t, family, plan, guard)) for t in HOOKS]
        return "".join(parts)

    def _show(self) -> str:
        parts = []
        for tool in TOOLS.values():
            for table in HOOKS:
                if found := _found(tool, table):
                    parts += [f"# {tool} -t {table}", *found]
        return "".join(f"{part}\n" for part in parts) + ipset.show()


def _restore(tool: str, script: str) -> None:
    if script:
        run([f"{tool}-restore", "--wait", "5", "--noflush"], script)


def _found(tool: str, table: str) -> list[str]:
    """Chains (``:NAME``) and rules (``-A``) of ours, as the save command prints them."""
    ours = re.compile(rf":{PREFIX}|-A {PREFIX}|-A .* -[jg] {PREFIX}[A-Z]+$")
    return [line for line in run([f"{tool}-save", "-t", table]).splitlines() if ours.match(line)]


def _table(table: str, found: list[str], rules: dict[str, list[str]]) -> str:
    """Input of the restore command that replaces what was found in a table.

    ``rules`` are those of each chain of ours; without any, everything of ours goes.
    """
    if not found and not rules:
        return ""
    chains = [line[1:].split()[0] for line in found if line.startswith(":")]
    lines = [f"*{table}"]
    lines += [f":{chain} - [0:0]" for chain in rules]  # an old one is emptied by that
    lines += [f"-D{line[2:]}" for line in found if not line.startswith((":", f"-A {PREFIX}"))]
    lines += [f"-F {chain}" for chain in chains if chain not in rules]
    lines += [f"-X {chain}" for chain in chains if chain not in rules]
    for chain, body in rules.items():
        lines += [f"-A {chain} {rule}" for rule in body]
    if rules:
        for hook in HOOKS[table]:
            target = f"{PREFIX}{hook}"
            lines.append(f"{CALL[table]} {hook} {_comment('service traffic')} -j {target}")
    return "\n".join([*lines, "COMMIT", ""])


def _rules(table: str, family: int, plan: CapturePlan, guard: Guard) -> dict[str, list[str]]:
    if table == "raw":
        chains = _raw(family, plan, guard)
    else:
        chains = _filter(plan) if table == "filter" else _mangle(family, plan)
    return {PREFIX + name: rules for name, rules in chains.items()}


def _comment(text: str) -> str:
    return f'-m comment --comment "svcdp: {text}"'


def _seen(mark: int) -> str:
    return f"-m mark --mark {mark:#x}/{mark:#x}"


def _filter(plan: CapturePlan) -> dict[str, list[str]]:
    accept = f"{_seen(plan.forward_mark)} {_comment('rewritten, to be let through')} -j ACCEPT"
    return {hook: [accept] for hook in HOOKS["filter"]}


def _mangle(family: int, plan: CapturePlan) -> dict[str, list[str]]:
    """Without services that have a mark: nothing."""
    marks = [mark for mark in plan.marks if mark.family == family]
    if not marks:
        return {}
    capture = [f"{_seen(plan.forward_mark)} {_comment('rewritten')} -j RETURN"]
    chains = {}
    for mark in marks:
        match = f"-m mark --mark {mark.mark:#x}/{plan.free_marks:#x}"
        capture.append(f"{match} {_comment(CAPTURED[mark.kind])} -g {PREFIX}{mark.kind.upper()}")
        chains[mark.kind.upper()] = [
            f"{_comment('so that the verdict is to go on')}"
            f" -j MARK --set-xmark {plan.pass_mark:#x}/{plan.pass_mark:#x}",
            f"{_comment(CAPTURED[mark.kind])} {_queue(plan, mark.kind)}",
        ]
    return dict.fromkeys(HOOKS["mangle"], capture) | chains


def _raw(family: int, plan: CapturePlan, guard: Guard) -> dict[str, list[str]]:
    passed = f"{_seen(plan.pass_mark)} {_comment('seen, not ours')} -g {PREFIX}PASSED"
    rewritten = f"{_seen(plan.forward_mark)} {_comment('rewritten')} -g {PREFIX}REWRITTEN"
    capture = f"{_comment('new to us')} -j {PREFIX}CAPTURE"
    nowhere = {4: "0.0.0.0/32", 6: "::/128"}[family]
    defragment = f"-d {nowhere} -m socket {_comment('puts fragments together before all this')}"
    martians = list(_martians(guard)) if family == 4 else []
    check = [f"{_comment('as the kernel does without svcdp')} -j {PREFIX}MARTIANS"] * bool(martians)
    reverse = list(_reverse_path(guard)) if family == 4 else []
    check += [f"{_comment('as the kernel does without svcdp')} -j {PREFIX}REVERSE"] * bool(reverse)
    pods = []
    if plan.pod_interface:
        set_mark = f"-j MARK --set-xmark {plan.pod_mark:#x}/{plan.pod_mark:#x}"
        pods = [f"-i {plan.pod_interface} {_comment('of a Pod')} {set_mark}"]
    chains = {
        "PREROUTING": [passed, rewritten, *check, *pods, capture, defragment],
        "OUTPUT": [passed, rewritten, capture],
        "PASSED": [f"{_comment('forget that')} -j MARK --set-xmark 0x0/{plan.pass_mark:#x}"],
        "REWRITTEN": [f"{_comment('conntrack saw half of it')} -j CT --notrack"],
        "CAPTURE": [*_untouchable(family, guard), *_captures(family, plan)],
    }
    if martians:
        chains["MARTIANS"] = martians
    if reverse:
        chains["REVERSE"] = reverse
    return chains


def _queue(plan: CapturePlan, kind: Kind) -> str:
    first, last = plan.queues_of(kind)
    numbers = f"--queue-num {first}" if first == last else f"--queue-balance {first}:{last}"
    return f"-j NFQUEUE {numbers}{' --queue-bypass' if plan.bypass else ''}"


def _untouchable(family: int, guard: Guard) -> Iterator[str]:
    """What the kernel would drop on its way to the queue, and is not about what we rewrote.

    The match itself turns tracking on, so it is not there where nobody asked for that.
    """
    if guard.tracked:
        protocol = {4: "icmp", 6: "ipv6-icmp"}[family]
        yield (
            f"-p {protocol} -m conntrack --ctstate RELATED ! --ctstatus CONFIRMED"
            f" {_comment('about a connection that is new to conntrack')} -j RETURN"
        )


def _captures(family: int, plan: CapturePlan) -> Iterator[str]:
    for address, port in plan.hosted:
        if family_of(address) == family:
            for protocol, (way, end) in product(("udp", "tcp"), (("-d", "dport"), ("-s", "sport"))):
                match = f"{way} {address} -p {protocol} -m {protocol} --{end} {port}"
                yield f"{match} {_comment('served by this host')} -j RETURN"
    for match in ICMP_ERRORS[family]:
        yield f"{match} {_comment('may be about a connection')} {_queue(plan, 'virtual')}"
    for kind in ipset.KINDS:
        for whole in (False, True):
            side = "src" if kind == "real" else "dst"
            name = ipset.set_name(kind, family, whole=whole)
            match = f"-m set --match-set {name} {side if whole else f'{side},{side}'}"
            yield f"{match} {_comment(CAPTURED[kind])} {_queue(plan, kind)}"
    for network in plan.networks:
        if family_of(network.cidr) == family:
            yield f"-d {network.cidr} {_comment('no service')} {_queue(plan, 'virtual')}"


def _martians(guard: Guard) -> Iterator[str]:
    """Drop packets from outside with a local source, and not those that loop back."""
    if guard.martians:
        for interface in guard.trusted:
            yield f"-i {interface} {_comment('had accept_local')} -j RETURN"
        # rpfilter finds no way back to a local address, but lets pass what comes from here:
        # by lo, and multicasts to ourselves, which seem to come by the interface they left.
        yield (
            "-m addrtype --src-type LOCAL -m rpfilter --loose --invert"
            f" {_comment('accept_local=0')} -j DROP"
        )


def _reverse_path(guard: Guard) -> Iterator[str]:
    """Drop packets that came by an interface which is not the way back to their source."""
    drop = f"-m rpfilter --accept-local --invert {_comment('rp_filter=1')} -j DROP"
    if guard.strict_default:
        for interface in guard.loose:
            yield f"-i {interface} {_comment('had no rp_filter=1')} -j RETURN"
        yield drop
    for interface in guard.strict:
        yield f"-i {interface} {drop}"
