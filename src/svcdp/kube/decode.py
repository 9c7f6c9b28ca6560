"""YAML and JSON manifests to :mod:`svcdp.kube.model` records.

Everything wrong is a :class:`svcdp.errors.ManifestError` with the file, the line, the
field and the object. Kinds that a proxy does not read are counted and skipped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec
import yaml

from svcdp.errors import ManifestError
from svcdp.kube._yaml import Lines, documents
from svcdp.kube.model import (
    EndpointSlice,
    LoadBalancerPool,
    Node,
    Object,
    ObjectKey,
    Pod,
    Service,
    ServiceCIDR,
    family_of,
    parse_address,
    parse_cidr,
)
from svcdp.kube.pools import parse_span

__all__ = ["Decoded", "decode", "decode_json", "decode_value"]

_Record = TypeVar("_Record", Service, EndpointSlice, Pod, Node, ServiceCIDR, LoadBalancerPool)
_Kind = tuple[str, str]
_LineOf = Callable[[str], int]  # field path -> line

_SERVICE: _Kind = ("v1", "Service")
_SLICE: _Kind = ("discovery.k8s.io/v1", "EndpointSlice")
_POD: _Kind = ("v1", "Pod")
_NODE: _Kind = ("v1", "Node")
_SERVICE_CIDR: _Kind = ("networking.k8s.io/v1", "ServiceCIDR")
_POOL: _Kind = ("svcdp.io/v1alpha1", "LoadBalancerPool")
_TYPES: dict[_Kind, type[Object]] = {
    _SERVICE: Service,
    _SLICE: EndpointSlice,
    _POD: Pod,
    _NODE: Node,
    _SERVICE_CIDR: ServiceCIDR,
    _POOL: LoadBalancerPool,
}
# Items of a typed list have no kind of their own when the API server writes them.
_LISTS: dict[_Kind, _Kind | None] = {
    ("v1", "List"): None,
    ("v1", "ServiceList"): _SERVICE,
    ("discovery.k8s.io/v1", "EndpointSliceList"): _SLICE,
    ("v1", "PodList"): _POD,
    ("v1", "NodeList"): _NODE,
    ("networking.k8s.io/v1", "ServiceCIDRList"): _SERVICE_CIDR,
    ("svcdp.io/v1alpha1", "LoadBalancerPoolList"): _POOL,
}

# Of what `parse_address` takes, that which ip_vs_ctl.c, ip_vs_add_dest, refuses as a server's.
_NO_SERVER = re.compile(r"255\.255\.255\.255$|fe[89ab][0-9a-f]:")


@dataclass(slots=True)
class Decoded:
    """What was found. ``ignored`` counts objects of other kinds: ``{"apps/v1 Deployment": 2}``."""

    objects: list[Object] = field(default_factory=list)
    errors: list[ManifestError] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def decode(data: bytes, file: str = "") -> Decoded:
    """All objects of a manifest file: JSON if its name ends so, else YAML. Raises nothing.

    Where ``errors`` is not empty the good objects of the file are there all the same; it
    is for the caller to use them or not.
    """
    decoder = _Decoder(file)
    if file.endswith(".json"):
        decoder.json(data)
    else:
        decoder.yaml(data)
    result = decoder.result
    if not (result.objects or result.errors or result.ignored):
        # Whoever rewrites a file truncates it first: empty means "not yet", not "nothing".
        decoder.error("holds no object; remove the file to remove its objects", 1)
    return result


def decode_value(value: object) -> list[Object]:
    """The object that ``value`` (as JSON gives it) is, or those of a List; none for other kinds.

    Raises ManifestError, without file and line.
    """
    decoder = _Decoder("")
    decoder.document(value, lambda _path: 0)
    if decoder.result.errors:
        raise decoder.result.errors[0]
    return decoder.result.objects


def decode_json(data: bytes, record: type[_Record]) -> _Record:
    """One object of a known kind, as an API server writes it. Raises ManifestError, without
    file and line.
    """
    try:
        found = msgspec.json.decode(data, type=record)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        if not isinstance(error, msgspec.ValidationError):
            raise ManifestError(f"not JSON: {error}") from None
        message, at = _split(error, "$")
        described = _describe(msgspec.json.decode(data), record.__name__)
        raise ManifestError(message, field=at, object=described) from None
    for at, message in _problems(found):
        raise ManifestError(message, field=f"${at}", object=str(found.key))
    return found


class _Decoder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.result = Decoded()
        self._seen: set[ObjectKey] = set()

    def yaml(self, data: bytes) -> None:
        lines = Lines(data)
        try:
            for index, value in enumerate(documents(data)):
                if value is not None:
                    self.document(value, partial(lines.line, index))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.error(f"not YAML: {error.problem}", mark.line + 1 if mark else 1)
        except yaml.YAMLError as error:
            self.error(f"not YAML: {' '.join(str(error).split())}", 1)

    def json(self, data: bytes) -> None:
        try:
            value = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            at = re.search(r"\(byte (\d+)\)", str(error))
            end = int(at[1]) if at else len(data)
            self.error(f"not JSON: {error}", data.count(b"\n", 0, end) + 1)
            return

        self.document(value, partial(Lines(data).line, 0))  # JSON is YAML, nearly

    def document(self, value: object, lines: _LineOf) -> None:
        kind = self._kind_of(value, "$", lines)
        if kind is None:
            return
        if kind not in _LISTS:
            self._object(value, kind, "$", lines)
            return
        assert isinstance(value, dict)
        items = value.get("items")
        if not isinstance(items, list):
            self.error("Expected `array`", lines("$.items"), "$.items")
            return
        for index, item in enumerate(items):
            path = f"$.items[{index}]"
            item_kind = _LISTS[kind] or self._kind_of(item, path, lines)
            if item_kind is not None:
                self._object(item, item_kind, path, lines)

    def _kind_of(self, value: object, path: str, lines: _LineOf) -> _Kind | None:
        if not isinstance(value, dict):
            self.error("Expected `object`", lines(path), path)
            return None
        for name in ("apiVersion", "kind"):
            if not isinstance(value.get(name), str):
                self.error("missing, or not a string", lines(f"{path}.{name}"), f"{path}.{name}")
                return None
        return value["apiVersion"], value["kind"]

    def _object(self, value: object, kind: _Kind, path: str, lines: _LineOf) -> None:
        record = _TYPES.get(kind)
        if record is None:
            self.result.ignored[" ".join(kind)] += 1
            return
        try:
            found = msgspec.convert(value, record)
        except msgspec.ValidationError as error:
            message, at = _split(error, path)
            self.error(message, lines(at), at, _describe(value, kind[1]))
            return
        problems = [(path + at, message) for at, message in _problems(found)]
        if found.key in self._seen:
            problems.append((path, "is in this file twice"))
        for at, message in problems:
            self.error(message, lines(at), at, str(found.key))
        if not problems:
            self._seen.add(found.key)
            self.result.objects.append(found)

    def error(self, message: str, line: int, field: str = "", object: str = "") -> None:
        self.result.errors.append(
            ManifestError(message, file=self.file, line=line, field=field, object=object)
        )


def _split(error: msgspec.ValidationError, path: str) -> tuple[str, str]:
    """Message and field path of what msgspec says."""
    message, _, at = str(error).partition(" - at `$")
    path += at.removesuffix("`")
    if missing := re.fullmatch("Object missing required field `(.+)`", message):
        path += f".{missing[1]}"
    return message, path


def _describe(value: Any, kind: str) -> str:
    """Kind, namespace and name of an object of which nothing is known to be right."""
    metadata = value.get("metadata") if isinstance(value, dict) else None
    if not isinstance(metadata, dict):
        return kind
    return f"{kind} {metadata.get('namespace') or 'default'}/{metadata.get('name')}"


def _problems(found: Object) -> Iterator[tuple[str, str]]:
    """What types cannot say: (field path, message)."""
    if isinstance(found, Service):
        yield from _cluster_ip_problems(found)
        yield from _port_problems(found)
    elif isinstance(found, EndpointSlice) and found.address_type != "FQDN":
        for index, endpoint in enumerate(found.endpoints or ()):
            for address in endpoint.addresses[:1]:
                yield from _server_problems(f".endpoints[{index}].addresses[0]", address)
    elif isinstance(found, Pod) and found.status:
        status = found.status
        if status.pod_ip:
            yield from _server_problems(".status.podIP", status.pod_ip)
        for index, each in enumerate(status.pod_ips or ()):
            if each.ip:
                yield from _server_problems(f".status.podIPs[{index}].ip", each.ip)
    elif isinstance(found, Node) and found.spec:
        yield from _cidr_problems(".spec.podCIDRs", found.spec.pod_cidrs)
        if found.spec.pod_cidr:
            yield from _problem_of(parse_cidr, ".spec.podCIDR", found.spec.pod_cidr)
    elif isinstance(found, ServiceCIDR) and found.spec:
        yield from _cidr_problems(".spec.cidrs", found.spec.cidrs)
    elif isinstance(found, LoadBalancerPool):
        for index, text in enumerate(found.spec.addresses):
            yield from _problem_of(parse_span, f".spec.addresses[{index}]", text)


def _cidr_problems(path: str, texts: Iterable[str] | None) -> Iterator[tuple[str, str]]:
    for index, text in enumerate(texts or ()):
        yield from _problem_of(parse_cidr, f"{path}[{index}]", text)


def _problem_of(parse: Callable[[str], object], path: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        parse(text)
    except ManifestError as error:
        yield path, error.message


def _server_problems(path: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        if _NO_SERVER.match(parse_address(text)):
            yield path, f"{text!r} cannot be a server's: broadcast, or link-local"
    except ManifestError as error:
        yield path, error.message


def _cluster_ip_problems(service: Service) -> Iterator[tuple[str, str]]:
    spec = service.spec
    fields = [(".spec.clusterIP", spec.cluster_ip or "None")]
    fields += [
        (f".spec.clusterIPs[{index}]", text) for index, text in enumerate(spec.cluster_ips or ())
    ]
    is_headless = spec.cluster_ip in (None, "", "None")
    bad = False
    for path, text in fields:
        if text != "None" or not is_headless:
            for problem in _problem_of(parse_address, path, text):
                bad = True
                yield problem
    if bad:
        return
    named = fields[1:] or fields
    for (path, text), family in zip(named, spec.ip_families or (), strict=False):
        if text != "None" and family_of(parse_address(text)) != family:
            yield path, f"{text} is not {family} as ipFamilies says"


def _port_problems(service: Service) -> Iterator[tuple[str, str]]:
    ports = service.spec.ports or ()
    names: set[str] = set()
    numbers: set[tuple[int, str]] = set()
    for index, port in enumerate(ports):
        path = f".spec.ports[{index}]"
        name, number = port.name or "", (port.port, port.protocol or "TCP")
        if not name and len(ports) > 1:
            yield f"{path}.name", "a port among several needs a name"
        elif name in names:
            yield f"{path}.name", f"two ports are called {name!r}"
        if number in numbers:
            yield f"{path}.port", f"two ports are {port.port}/{number[1]}"
        names.add(name)
        numbers.add(number)
