"""Annotations by which a Service asks for more than Kubernetes has fields for.

=================================  =============================================
``svcdp.io/scheduler``             a scheduler's name
``svcdp.io/scheduler-flags``       ``sh-port, sh-fallback`` of sh, and ``mh-port``,
                                   ``mh-fallback`` of mh
``svcdp.io/weights``               ``10.1.0.7=3, web-0=5``: an endpoint's address or
                                   its Pod's name, and a weight from 0 (no new
                                   connections) to 65535; the address wins, others
                                   have 1. Only weighted schedulers look at weights
                                   above 0
``svcdp.io/thresholds``            ``upper=100, lower=80``: connections of an endpoint
                                   at which it gets no new ones, and at which again
``svcdp.io/forwarding``            ``masq``, ``tunnel`` or ``dr``, for cluster IPs
``svcdp.io/tunnel-type``           ``ipip``, ``gre`` or ``gue``
``svcdp.io/tunnel-port``           GUE's UDP port; 6080
``svcdp.io/tunnel-checksum``       ``true``: the one that GRE and GUE can do without
``svcdp.io/mss-clamp``             ``true`` or ``false``: TCP peers hear what fits into
                                   the tunnel; default: true for tunnels
``svcdp.io/port-range``            ``rtp=30000-30100``: the port named rtp, 30000, is
                                   all of these; without a name if there is one port
``svcdp.io/timeouts``              ``udp=30, established=7200``: seconds by state
``svcdp.io/on-endpoint-removal``   ``drain``: its connections go on until they end;
                                   ``drain=30s``: for that long, and then both ends
                                   of those over TCP hear of a reset; ``reset``: they
                                   hear it at once; ``expire`` or ``drop`` them
``svcdp.io/passive-health``        ``true``, or ``failures=3, ejection=10,
                                   max-ejection=300``: endpoints that do not answer so
                                   often in a row get no new connections for seconds,
                                   twice as long each time, and a SYN that is sent
                                   again goes to another one; not with a helper
``svcdp.io/one-packet``            ``true``: each datagram is scheduled by itself
``svcdp.io/persistence-netmask``   ``ipv4=24, ipv6=64``: clients that agree in so many
                                   bits are one for session affinity
``svcdp.io/persistence-engine``    ``sip``: affinity by Call-ID, of UDP
``svcdp.io/helper``                ``ftp``: follow data connections, of TCP
=================================  =============================================

A bad value is reported, and the Service keeps its default; so is a name below ``svcdp.io/`` that
nobody knows. ``svcdp.io/load-balancer-ips`` and ``-sharing`` are read by :mod:`svcdp.kube.pools`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

from svcdp.errors import ManifestError
from svcdp.kube.context import NodeContext
from svcdp.kube.endpoints import EndpointInfo, PortKey
from svcdp.kube.model import Service, parse_address
from svcdp.types import ForwardMethod, PassiveHealth, TunnelSpec

__all__ = ["Annotations", "annotation_problem", "read_annotations"]

_PREFIX = "svcdp.io/"
_MAX_WEIGHT = 65535
_MAX = (1 << 31) - 1
_GUE_PORT = 6080  # IANA: "gue"

#: What the dataplane knows by name. A test compares.
FLAGS = {"sh": ("sh-fallback", "sh-port"), "mh": ("mh-fallback", "mh-port")}
STATES = frozenset(
    "none established syn_sent syn_recv fin_wait time_wait close close_wait last_ack listen"  # noqa: SIM905
    " synack udp sctp_none sctp_init1 sctp_init sctp_cookie_sent sctp_cookie_replied"
    " sctp_cookie_wait sctp_cookie sctp_cookie_echoed sctp_established sctp_shutdown_sent"
    " sctp_shutdown_received sctp_shutdown_ack_sent sctp_rejected sctp_closed".split()
)

NAMES = frozenset(
    "scheduler scheduler-flags weights thresholds forwarding tunnel-type tunnel-port"  # noqa: SIM905
    " tunnel-checksum mss-clamp port-range timeouts on-endpoint-removal passive-health one-packet"
    " persistence-netmask persistence-engine helper load-balancer-ips load-balancer-sharing".split()
)
"""All annotations of Services, without our prefix."""

T = TypeVar("T")
RemovalPolicy = Literal["drain", "expire", "drop", "reset"]


@dataclass(frozen=True, slots=True)
class Removal:
    """What becomes of connections whose endpoint is removed, and after how many seconds."""

    policy: RemovalPolicy = "drain"
    grace: int = 0


@dataclass(frozen=True, slots=True)
class Annotations:
    """What a Service asks for."""

    scheduler: str = "rr"
    scheduler_flags: tuple[str, ...] = ()
    method: str = ForwardMethod.MASQ
    tunnel: TunnelSpec = field(default_factory=TunnelSpec)
    mss_clamp: bool | None = None
    weights: Mapping[str, int] = field(default_factory=dict)
    upper: int = 0
    lower: int = 0
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    timeouts: tuple[tuple[str, float], ...] = ()
    removal: Removal = field(default_factory=Removal)
    passive_health: PassiveHealth | None = None
    one_packet: bool = False
    netmasks: Mapping[str, int] = field(default_factory=dict)
    engine: str = ""
    helper: str = ""

    def weight(self, endpoint: EndpointInfo) -> int:
        """The weight of an endpoint."""
        if not self.weights:
            return 1
        by_name = self.weights.get(endpoint.target, 1)
        return self.weights.get(endpoint.address, by_name)

    def fields(self, port: PortKey, *, sticky: bool) -> dict[str, Any]:
        """What they say of a service port, as fields of a ServiceSpec. ``sticky``: it has session
        affinity.
        """
        if self is _DEFAULTS:
            return {}
        return {
            "scheduler": self.scheduler,
            "scheduler_flags": self.scheduler_flags,
            "persistence_netmask": self.netmasks.get(port.family.lower()) if sticky else None,
            "persistence_engine": self.engine if sticky and port.protocol == "UDP" else "",
            "one_packet": self.one_packet and port.protocol == "UDP",
            "timeouts": self.timeouts,
            "on_removal": self.removal.policy,
            "removal_grace": self.removal.grace,
            "helper": self.helper if port.protocol == "TCP" else "",
            "passive_health": self.passive_health if port.protocol == "TCP" else None,
        }


_DEFAULTS = Annotations()


def read_annotations(
    service: Service, node: NodeContext
) -> tuple[Annotations, list[ManifestError]]:
    """What a Service asks for, and what is wrong with it."""
    texts = {
        name.removeprefix(_PREFIX): text.strip()
        for name, text in (service.metadata.annotations or {}).items()
        if name.startswith(_PREFIX)
    }
    if not texts:
        is_usual = node.scheduler == _DEFAULTS.scheduler
        return _DEFAULTS if is_usual else Annotations(scheduler=node.scheduler), []
    problems = [
        annotation_problem(service, name, f"no annotation is called so{_alike(name)}")
        for name in texts
        if name not in NAMES
    ]

    def take(name: str, read: Callable[[str], T], default: T, otherwise: str = "") -> T:
        if name not in texts:
            return default
        try:
            return read(texts[name])
        except ManifestError as error:
            message = f"{error.message}; {otherwise or f'{default!r} stays in force'}"
            problems.append(annotation_problem(service, name, message))
            return default

    scheduler = take("scheduler", _choice(node.schedulers, node.scheduler), node.scheduler)
    kind = take("tunnel-type", _choice(("ipip", "gre", "gue")), "ipip")
    thresholds: dict[str, int] = take("thresholds", _thresholds, {}, "there are none")
    helper = take("helper", _choice(("ftp",)), "")
    annotations = Annotations(
        scheduler=scheduler,
        scheduler_flags=take("scheduler-flags", _flags(scheduler), (), "none is set"),
        method=take("forwarding", _choice(node.methods, "masq"), _DEFAULTS.method),
        tunnel=TunnelSpec(
            type=cast(Literal["ipip", "gre", "gue"], kind),
            port=take("tunnel-port", _number(1, 65535), _GUE_PORT) if kind == "gue" else 0,
            checksum=take("tunnel-checksum", _switch, False),
        ),
        mss_clamp=take("mss-clamp", _switch, None, "tunnels have it"),
        weights=take("weights", _weights, {}, "all weights stay 1"),
        upper=thresholds.get("upper", 0),
        lower=thresholds.get("lower", 0),
        ranges=take("port-range", _ranges(service), {}, "each port is one"),
        timeouts=take("timeouts", _timeouts, (), "the usual ones stay in force"),
        removal=take("on-endpoint-removal", _removal, Removal(), "'drain' stays in force"),
        one_packet=take("one-packet", _switch, False),
        netmasks=take("persistence-netmask", _netmasks, {}, "each address is a client"),
        engine=take("persistence-engine", _choice(("sip",)), ""),
        helper=helper,
        passive_health=take("passive-health", _passive_health(helper), None, "it is off"),
    )
    return annotations, problems


def annotation_problem(service: Service, name: str, message: str) -> ManifestError:
    """What is wrong with an annotation of a Service; ``name`` is without our prefix."""
    return service.problem(f"metadata.annotations['{_PREFIX}{name}']", message)


def _alike(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, n=1)
    return f": did you mean {_PREFIX}{close[0]}?" if close else ""


# Readers of values. Each raises ManifestError.


def _choice(choices: Iterable[str], *more: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text in {*choices, *more}:
            return text
        raise ManifestError(f"{text!r} is not one of {', '.join(sorted(choices))}")

    return read


def _removal(text: str) -> Removal:
    policy, given, time = text.partition("=")
    if not given:
        names = ("drain", "expire", "drop", "reset")
        return Removal(cast(RemovalPolicy, _choice(names)(text)))
    if policy.strip() != "drain" or not time.strip().endswith("s"):
        raise ManifestError(f"{text!r} is not of the form drain=30s")
    return Removal("reset", _number(1, _MAX)(time.strip().removesuffix("s")))


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ManifestError(f"{text!r} is neither true nor false")
    return text == "true"


def _number(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,10}", text) and low <= int(text) <= high:
            return int(text)
        raise ManifestError(f"{text!r} is not a number from {low} to {high}")

    return read


def _items(text: str) -> list[str]:
    return [item for part in text.split(",") if (item := part.strip())]


def _pairs(text: str, example: str) -> dict[str, str]:
    """``a=1, b=2``"""
    pairs: dict[str, str] = {}
    for item in _items(text):
        key, _, value = (part.strip() for part in item.partition("="))
        if not (key and value):
            raise ManifestError(f"{item!r} is not of the form {example}")
        if key in pairs:
            raise ManifestError(f"{key!r} is given twice")
        pairs[key] = value
    return pairs


def _weights(text: str) -> dict[str, int]:
    weights: dict[str, int] = {}
    for item in _items(text):
        who, _, number = (part.strip() for part in item.partition("="))
        if not (who and number.isascii() and number.isdigit() and len(number) <= 5):
            raise ManifestError(f"{item!r} is not an endpoint=weight such as 10.1.0.7=3")
        weight = int(number)
        if weight > _MAX_WEIGHT:
            raise ManifestError(f"{item!r}: a weight is at most {_MAX_WEIGHT}")
        with suppress(ManifestError):  # it is the name of a Pod
            who = parse_address(who)
        if who in weights:
            raise ManifestError(f"{who!r} has two weights")
        weights[who] = weight
    return weights


def _flags(scheduler: str) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        known = FLAGS.get(scheduler, ())
        for item in _items(text):
            if item not in known:
                names = ", ".join(known) or "none"
                raise ManifestError(f"{item!r}: flags of scheduler {scheduler} are {names}")
        return tuple(sorted(set(_items(text))))

    return read


def _thresholds(text: str) -> dict[str, int]:
    numbers = {
        _choice(("upper", "lower"))(key): _number(0, _MAX)(value)
        for key, value in _pairs(text, "upper=100, lower=80").items()
    }
    if numbers.get("lower", 0) > numbers.get("upper", 0):
        raise ManifestError("lower is above upper")
    return numbers


def _timeouts(text: str) -> tuple[tuple[str, float], ...]:
    timeouts = {
        _choice(STATES)(state): float(_number(1, _MAX)(seconds))
        for state, seconds in _pairs(text, "udp=30, established=7200").items()
    }
    return tuple(sorted(timeouts.items()))


def _passive_health(helper: str) -> Callable[[str], PassiveHealth | None]:
    def read(text: str) -> PassiveHealth | None:
        if text == "false":
            return None
        if helper:
            raise ManifestError(f"not with helper {helper}")
        if text == "true":
            return PassiveHealth()
        names = {"failures": "failures", "ejection": "ejection", "max-ejection": "max_ejection"}
        example = "failures=3, ejection=10, max-ejection=300"
        numbers = {
            names[_choice(names)(key)]: _number(1, 1 << 30)(value)
            for key, value in _pairs(text, example).items()
        }
        health = replace(PassiveHealth(), **numbers)
        if health.ejection > health.max_ejection:
            raise ManifestError("ejection is above max-ejection")
        return health

    return read


def _netmasks(text: str) -> dict[str, int]:
    bits = {"ipv4": 32, "ipv6": 128}
    return {
        _choice(bits)(family): _number(1, bits[family])(number)
        for family, number in _pairs(text, "ipv4=24, ipv6=64").items()
    }


def _ranges(service: Service) -> Callable[[str], dict[str, tuple[int, int]]]:
    ports = {port.name or "": port.port for port in service.spec.ports or ()}

    def read(text: str) -> dict[str, tuple[int, int]]:
        alone = len(ports) == 1 and "=" not in text
        pairs = dict.fromkeys(ports, text) if alone else _pairs(text, "rtp=30000-30100")
        ranges = {}
        for name, value in pairs.items():
            first, _, last = (part.strip() for part in value.partition("-"))
            if name not in ports:
                raise ManifestError(f"{name!r} is no port of this Service")
            bounds = (_number(1, 65535)(first), _number(1, 65535)(last))
            if bounds[0] != ports[name] or bounds[1] < bounds[0]:
                raise ManifestError(f"{value!r} is no range that begins at port {ports[name]}")
            ranges[name] = bounds
        return ranges

    return read
