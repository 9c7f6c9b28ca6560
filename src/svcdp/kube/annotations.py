"""Annotations by which a Service asks for more than Kubernetes has fields for.

==========================  ====================================================
``svcdp.io/scheduler``      a scheduler's name
``svcdp.io/forwarding``     ``masq``, ``tunnel`` or ``dr``
``svcdp.io/weights``        ``10.1.0.7=3, web-0=5``: an endpoint's address or its
                            Pod's name, and a weight from 0 (no new connections)
                            to 65535; the address wins, others have 1. Only
                            weighted schedulers look at weights above 0
==========================  ====================================================

A bad value is reported, and the Service keeps its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from svcdp.errors import ManifestError
from svcdp.kube.context import NodeContext
from svcdp.kube.endpoints import EndpointInfo
from svcdp.kube.model import Service, parse_address

__all__ = ["Annotations", "read_annotations"]

_PREFIX = "svcdp.io/"
_MAX_WEIGHT = 65535


@dataclass(frozen=True, slots=True)
class Annotations:
    """What a Service asks for."""

    scheduler: str = "rr"
    method: str = "masq"
    weights: Mapping[str, int] = field(default_factory=dict)

    def weight(self, endpoint: EndpointInfo) -> int:
        """The weight of an endpoint."""
        if not self.weights:
            return 1
        by_name = self.weights.get(endpoint.target, 1)
        return self.weights.get(endpoint.address, by_name)


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
        return _DEFAULTS, []
    problems: list[ManifestError] = []

    def problem(name: str, message: str) -> None:
        path = f"$.metadata.annotations['{_PREFIX}{name}']"
        problems.append(ManifestError(message, field=path, object=str(service.key)))

    def choice(name: str, default: str, choices: frozenset[str]) -> str:
        text = texts.get(name, default)
        if text in choices or text == default:
            return text
        known = ", ".join(sorted(choices))
        problem(name, f"{text!r} is not one of {known}; {default!r} stays in force")
        return default

    weights: dict[str, int] = {}
    try:
        weights = _weights(texts.get("weights", ""))
    except ManifestError as error:
        problem("weights", f"{error.message}; all weights stay 1")
    annotations = Annotations(
        scheduler=choice("scheduler", _DEFAULTS.scheduler, frozenset(node.schedulers)),
        method=choice("forwarding", _DEFAULTS.method, frozenset(node.methods)),
        weights=weights,
    )
    return annotations, problems


def _weights(text: str) -> dict[str, int]:
    weights: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
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
