"""What a host can do, and what of it the daemon needs: ``svcdp check``."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from svcdp.errors import PlatformError, SourceError
from svcdp.node.capture import choose_backend
from svcdp.node.client import AdminClient
from svcdp.node.config import NodeConfig
from svcdp.node.network import discover_addresses
from svcdp.rules.probe import BACKENDS, probe

__all__ = ["Check", "run_checks"]

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}  # linux/capability.h


@dataclass(frozen=True)
class Check:
    """One finding. ``fix`` says what to do about it."""

    status: Literal["ok", "warn", "fail"]
    name: str
    detail: str
    fix: str = ""


def run_checks(config: NodeConfig) -> Iterator[Check]:
    """All checks, in this network namespace. Changes nothing."""
    yield Check("ok", "kernel", f"{platform.system()} {platform.release()}")
    yield from _capabilities()
    daemon = _daemon(config)
    yield daemon or Check("ok", "daemon", "none is running")
    if daemon is None:  # else they are its own
        yield from _queues(config)
        yield from _ports(config)
    yield from _rules(config)
    yield from _forwarding()
    yield from _bridges()
    yield _addresses(config)


def _capabilities() -> Iterator[Check]:
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    effective = int(status["CapEff"], 16)
    for name, bit in CAPABILITIES.items():
        if effective >> bit & 1:
            yield Check("ok", name, "effective")
        else:
            yield Check("fail", name, "missing", "run as root, or grant it")


def _queues(config: NodeConfig) -> Iterator[Check]:
    try:
        lines = Path("/proc/net/netfilter/nfnetlink_queue").read_text().splitlines()
    except OSError:
        yield Check("warn", "queues", "nfnetlink_queue is not loaded", "modprobe nfnetlink_queue")
        return
    taken = {int(line.split()[0]): line.split()[1] for line in lines}
    wanted = {n for r in (config.queues, config.tunnel_queues) for n in range(r.first, r.last + 1)}
    clashes = sorted(taken.keys() & wanted)
    for number in clashes:
        detail = f"queue {number} is taken by netlink port {taken[number]}"
        yield Check("fail", "queues", detail, "stop that program, or set queues")
    if not clashes:
        yield Check("ok", "queues", f"{config.queues},{config.tunnel_queues} are free")


def _rules(config: NodeConfig) -> Iterator[Check]:
    found = probe()
    for backend in BACKENDS:
        if missing := found.missing(backend):
            yield Check("warn", f"rules by {backend}", f"lacks {', '.join(missing)}")
        else:
            yield Check("ok", f"rules by {backend}", "possible")
    try:
        yield Check("ok", "rules", choose_backend(config).name)
    except PlatformError as error:
        yield Check("fail", "rules", error.strerror or str(error), "install what is missing")
    if missing := found.missing("policy routes"):
        yield Check("warn", "forwarding by dr", f"lacks {', '.join(missing)}")
    else:
        yield Check("ok", "forwarding by dr", "possible")


def _ports(config: NodeConfig) -> Iterator[Check]:
    """Those of probes and metrics: kube-proxy has the same."""
    for bind in (config.healthz_bind_address, config.metrics_bind_address):
        if bind.place is None:
            continue
        try:
            socket.create_server(
                bind.place, family=socket.AF_INET6 if ":" in bind.place[0] else socket.AF_INET
            ).close()
        except OSError as error:
            fix = "stop kube-proxy, or set healthzBindAddress and metricsBindAddress"
            yield Check("warn", "ports", f"{bind}: {error.strerror or error}", fix)
        else:
            yield Check("ok", "ports", f"{bind} is free")


def _forwarding() -> Iterator[Check]:
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        try:
            on = Path("/proc/sys", *name.split(".")).read_text().strip() != "0"
        except OSError:
            continue  # a kernel without IPv6
        fix = "" if on else f"sysctl -w {name}=1"
        yield Check("ok" if on else "warn", name, "on" if on else "off: Pods need it", fix)


def _bridges() -> Iterator[Check]:
    """Whether rules see what a bridge passes on between its Pods: answers that they do not see
    keep the Pod's own address.
    """
    bridges = sorted(path.parent.name for path in Path("/sys/class/net").glob("*/bridge"))
    if not bridges:
        return
    for tool in ("iptables", "ip6tables"):
        name = f"net.bridge.bridge-nf-call-{tool}"
        path = Path("/proc/sys", *name.split("."))
        if not path.exists():
            fix = "modprobe br_netfilter"
        elif path.read_text().strip() == "0":
            fix = f"sysctl -w {name}=1"
        else:
            yield Check("ok", name, "on")
            continue
        detail = f"off: Pods on one bridge ({', '.join(bridges)}) cannot serve each other"
        yield Check("warn", name, detail, fix)


def _addresses(config: NodeConfig) -> Check:
    addresses = config.addresses or discover_addresses()
    if addresses:
        return Check("ok", "addresses", ", ".join(addresses))
    return Check("warn", "addresses", "none: no node ports, no masquerading", "set addresses")


def _daemon(config: NodeConfig) -> Check | None:
    try:
        with AdminClient(config.admin_path) as client:
            (status,) = client.get("status")
    except SourceError:
        return None
    problems = status["problems"]
    detail = f"running: {status['counts']['services']} services, {len(problems)} problems"
    return Check("warn" if problems else "ok", "daemon", detail, "; ".join(problems))
