"""Services as ``ipvsadm-save`` prints them, for ``svcdp ipvs restore`` and ``ipvsadm-restore``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from svcdp.dataplane import TIMEOUTS
from svcdp.ipvs.listing import flag_names, mask
from svcdp.ipvs.restore import STATES, new_service
from svcdp.types import DestinationSpec, ServiceSpec

__all__ = ["save", "unsaved"]

PROTOCOLS = {"tcp": "-t", "udp": "-u", "sctp": "--sctp-service"}
METHODS = {"masq": "-m", "tunnel": "-i", "dr": "-g", "local": "-g"}


def save(specs: Iterable[ServiceSpec], timeouts: Mapping[str, float] = TIMEOUTS) -> Iterator[str]:
    """A line for each service and for each of its destinations, in the order in which they were
    added; numeric. Unlike ipvsadm's they tell thresholds, and ``timeouts`` (seconds by state)
    that are not IPVS's.
    """
    changed = [_seconds(timeouts, state) for state in STATES]
    if any(changed):
        yield f"--set {' '.join(map(str, changed))}"
    for spec in specs:
        address = _address(spec)
        yield " ".join((f"-A {address}", *_service_words(spec)))
        for each in spec.destinations:
            yield " ".join((f"-a {address} -r {_endpoint(each.address, each.port)}", *_words(each)))


def unsaved(specs: Iterable[ServiceSpec]) -> Iterator[str]:
    """What of the services ipvsadm has no word for, so that it is lost: a line each. Not what
    the host finds out itself of the way to a server.
    """
    for spec in specs:
        plain = new_service(spec.key)
        fields = ["rules", "masquerade_address", "persistence_group", "last_port", "helper"]
        fields += ["on_removal", "removal_grace", "persistence_timed", "timeouts"]
        fields += ["passive_health", "kept"]
        if spec.scheduler == "mh":
            fields.append("mh_table_size")
        lost = [field for field in fields if getattr(spec, field) != getattr(plain, field)]
        if spec.mss_clamp != any(each.tunnel for each in spec.destinations):
            lost.append("mss_clamp")
        if spec.port == 0 and spec.persistence is None:
            lost.append("all ports without persistence")
        if lost:
            yield f"{spec}: {', '.join(lost)}"


def _seconds(timeouts: Mapping[str, float], state: str) -> int:
    """For ``--set``, which knows whole seconds; 0: as it is."""
    seconds = timeouts.get(state, TIMEOUTS[state])
    return 0 if seconds == TIMEOUTS[state] else max(round(seconds), 1)


def _address(spec: ServiceSpec) -> str:
    if spec.protocol == "fwmark":
        return f"-f {spec.port}" + (" -6" if ":" in spec.address else "")
    return f"{PROTOCOLS[spec.protocol]} {_endpoint(spec.address, spec.port)}"


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _service_words(spec: ServiceSpec) -> Iterator[str]:
    yield f"-s {spec.scheduler}"
    if spec.persistence is not None:
        yield f"-p {spec.persistence}"
        if spec.persistence_netmask is not None:
            bits = spec.persistence_netmask
            yield f"-M {bits if ':' in spec.address else mask(bits)}"
    if spec.persistence_engine:
        yield f"--pe {spec.persistence_engine}"
    if spec.one_packet:
        yield "-o"
    if spec.scheduler_flags:
        yield f"-b {','.join(flag_names(spec))}"


def _words(spec: DestinationSpec) -> Iterator[str]:
    yield f"{METHODS[spec.method]} -w {spec.weight}"
    if spec.upper:
        yield f"-x {spec.upper}"
    if spec.lower:
        yield f"-y {spec.lower}"
    if spec.tunnel is not None:
        yield f"--tun-type {spec.tunnel.type}"
        if spec.tunnel.port:
            yield f"--tun-port {spec.tunnel.port}"
        if spec.tunnel.type != "ipip":
            yield "--tun-csum" if spec.tunnel.checksum else "--tun-nocsum"
