"""What this kernel and its tools can do, tried in a network namespace that is thrown away."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from svcdp.errors import ConfigError, FeatureUnavailable, MissingCapability
from svcdp.io.netns import NetNS
from svcdp.rules.backend import Backend, KernelBackend
from svcdp.rules.iptables import IptablesBackend
from svcdp.rules.nft import NftBackend

__all__ = ["Feature", "Probe", "choose", "probe"]

BACKENDS: dict[str, type[KernelBackend]] = {"iptables": IptablesBackend, "nft": NftBackend}
"""The best first: only iptables can let packets through a FORWARD chain that drops."""

COMMANDS = {
    "iptables": (
        "ip",
        "ipset",
        "iptables-restore",
        "iptables-save",
        "ip6tables-restore",
        "ip6tables-save",
    ),
    "nft": ("ip", "nft"),
}
CAP_NET_ADMIN = 12  # linux/capability.h
TIMEOUT = 10.0  # seconds

# A namespace needs CAP_SYS_ADMIN, or a user namespace, in which one has it.
NAMESPACES = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])

MATCHES = {
    "NFQUEUE": "-j NFQUEUE --queue-balance 0:1 --queue-bypass",
    "CT": "-j CT --notrack",
    "MARK": '-m mark --mark 1/1 -m comment --comment "svcdp" -j MARK --set-xmark 0/1',
    "socket": "-m socket",
    "conntrack": "-m conntrack --ctstate RELATED ! --ctstatus CONFIRMED",
}
IPV4_MATCHES = {
    "addrtype": "-m addrtype --src-type LOCAL -j DROP",
    "rpfilter": "-m rpfilter --loose --invert -j DROP",
}
NFT_STATEMENTS = {
    "sets": "ip daddr . meta l4proto . th dport { 192.0.2.1 . tcp . 80 }",
    "queue": "queue num 0-1 bypass",
    "notrack": "notrack",
    "ct": "ct state related ct status & confirmed == 0",
    "fib": "fib saddr type local fib saddr . iif oif missing drop",
    "tproxy": "ip daddr 0.0.0.0 meta l4proto udp tproxy ip to :1",
}


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that a backend needs, or that forwarding by dr does. ``detail`` says why it is
    not available.
    """

    backend: Literal["iptables", "nft", "policy routes"]
    name: str
    available: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found."""

    net_admin: bool
    features: tuple[Feature, ...]

    def missing(self, backend: str) -> list[str]:
        """Names of what a backend lacks; empty: it works."""
        return [f.name for f in self.features if f.backend == backend and not f.available]


def probe() -> Probe:
    """Find out. Raises nothing for what is missing.

    Without the right to make a namespace only the commands are looked for.
    """
    return Probe(_has_net_admin(), tuple(_features()))


def choose(name: str = "auto", *, netns: NetNS = None, run_dir: str = "/run/svcdp") -> Backend:
    """The backend ``iptables`` or ``nft``; ``auto`` is the first that works.

    :class:`svcdp.FeatureUnavailable` says what is missing, :class:`svcdp.MissingCapability`
    that CAP_NET_ADMIN is.
    """
    if name not in ("auto", *BACKENDS):
        raise ConfigError(f"rules {name!r}: none of auto, {', '.join(BACKENDS)}")
    found = probe()
    if not found.net_admin:
        raise MissingCapability(errno.EPERM, "rules need CAP_NET_ADMIN: run as root")
    candidates = list(BACKENDS) if name == "auto" else [name]
    for candidate in candidates:
        if not found.missing(candidate):
            return BACKENDS[candidate](netns, run_dir)
    lacks = "; ".join(f"{c} lacks {', '.join(found.missing(c))}" for c in candidates)
    raise FeatureUnavailable(errno.ENOTSUP, f"packets cannot be captured here: {lacks}")


def _has_net_admin() -> bool:
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return bool(int(status["CapEff"], 16) >> CAP_NET_ADMIN & 1)


def _features() -> Iterator[Feature]:
    present: dict[str, bool] = {}
    for backend in ("iptables", "nft"):
        lacking = [command for command in COMMANDS[backend] if shutil.which(command) is None]
        present[backend] = not lacking
        for command in COMMANDS[backend]:
            detail = "not installed" if command in lacking else ""
            yield Feature(backend, f"command {command}", not detail, detail)
    space = next((argv for argv in NAMESPACES if _error([*argv, "true"]) is None), None)
    if space is None:
        return
    for family in (4, 6):
        rule = f"ip -{family} rule add priority 1 fwmark 1/1 goto 2 protocol 112"
        script = f"{rule}; ip -{family} rule add priority 2 nop"
        detail = _error([*space, "sh", "-ec", script]) or ""
        yield Feature("policy routes", f"ip -{family} rule", not detail, detail)
    if present["iptables"]:
        for name, script in _iptables_scripts():
            detail = _error([*space, "sh", "-ec", script]) or ""
            yield Feature("iptables", name, not detail, detail)
    if present["nft"]:
        for name, statement in NFT_STATEMENTS.items():
            chain = "chain inet t c { type filter hook prerouting priority raw; }"
            script = f"nft 'add table inet t; add {chain}; add rule inet t c {statement}'"
            detail = _error([*space, "sh", "-ec", script]) or ""
            yield Feature("nft", name, not detail, detail)


def _iptables_scripts() -> Iterator[tuple[str, str]]:
    for tool, inet in (("iptables", "inet"), ("ip6tables", "inet6")):
        raw = f"{tool} -w 5 -t raw -A PREROUTING"
        matches = MATCHES | (IPV4_MATCHES if tool == "iptables" else {})
        for name, rule in matches.items():
            yield f"{tool} {name}", f"{raw} {rule}"
        create = f"ipset create t hash:ip,port family {inet}"
        yield f"{tool} set", f"{create}; {raw} -m set --match-set t dst,dst -j ACCEPT"


def _error(argv: Sequence[str]) -> str | None:
    """What the command says when it fails, None when it works."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip().partition("\n")[0] or "failed"
