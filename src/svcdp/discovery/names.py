"""The names of a cluster's Services: Kubernetes' DNS schema 1.1.0, kept by change. Pure.

https://github.com/kubernetes/dns/blob/master/docs/specification.md
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dns.exception
import dns.name
import dns.reversename
import dns.rrset
from dns.name import Name
from dns.rcode import Rcode
from dns.rdata import Rdata
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType
from dns.rdtypes.ANY.CNAME import CNAME
from dns.rdtypes.ANY.NS import NS
from dns.rdtypes.ANY.PTR import PTR
from dns.rdtypes.ANY.SOA import SOA
from dns.rdtypes.ANY.TXT import TXT
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA
from dns.rdtypes.IN.SRV import SRV
from dns.rrset import RRset

from svcdp.errors import ConfigError
from svcdp.kube.model import Endpoint, EndpointSlice, Service, ServiceRef, family_of, parse_address
from svcdp.kube.resolve import cluster_ips

__all__ = ["RECORD_HEAD", "TTL", "Answer", "Key", "Names", "key_of"]

SCHEMA = "1.1.0"
TTL = 5  #: seconds, of positive and negative answers: names change as fast as endpoints
# RFC 1035, 2.3.4: a name has 255 octets, and the longest one here three labels of 64 and "svc".
ZONE_MAX = 255 - 3 * 64 - 4
# Of too many records some are told: what does not fit into a message is no answer at all.
ANSWER_MAX = 48 << 10  # bytes
RECORD_HEAD = 12  #: bytes of a record whose name is compressed (RFC 1035, 3.2.1)
ADDITIONAL_MAX = 64  # addresses told besides, or none: who needs more of them asks
CHANGED_MAX = 1 << 16  # names of which it is known when they changed

Key = tuple[bytes, ...]
"""The labels of a name, in lower case."""
Record = tuple[Any, ...]
"""A type and the fields of dnspython's class for it, which is slow to make and to compare."""

_IN = RdataClass.IN
_KINDS: dict[RdataType, Any] = {
    RdataType[each.__name__]: each for each in (A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT)
}
_REFRESH, _RETRY, _EXPIRE = 7200, 1800, 86400  # seconds; for secondaries, of which there are none
_IPV4 = re.compile(r"[0-9]+(\.[0-9]+){3}")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NOBODY = ServiceRef("", "")
"""Whose records are those of the zone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The sections of a response. ``is_own``: it is the cluster's, not what somebody else says.
    ``is_denial``: the same is said, but for the question, of each name of that length.
    """

    rcode: Rcode = Rcode.NOERROR
    answer: tuple[RRset, ...] = ()
    authority: tuple[RRset, ...] = ()
    additional: tuple[RRset, ...] = ()
    is_own: bool = False
    is_denial: bool = False

    @property
    def alias(self) -> Name | None:
        """Where the name that was asked for points to, if that is all that is known of it."""
        for record in self.answer[-1] if self.answer else ():
            if isinstance(record, CNAME):
                return record.target
        return None

    def told_of(self, name: Name) -> frozenset[Key]:
        """Whose records it was made of, or their absence, as the answer for a ``name``."""
        targets = [
            record.target
            for rrset in self.answer
            for record in rrset
            if isinstance(record, CNAME | SRV | NS | PTR)
        ]
        return frozenset(map(key_of, [name, *targets]))


class Names:
    """What Services and their EndpointSlices are called, below a zone and by address.

    ``addresses`` are those of the zone's server. Not safe for several threads.
    """

    def __init__(self, zone: str = "cluster.local", addresses: Iterable[str] = ()) -> None:
        self.zone = _zone(zone)
        self._apex = key_of(self.zone)
        self._server = Name((b"ns", b"dns", *self.zone.labels))
        self._mailbox = Name((b"hostmaster", *self.zone.labels))
        self._zone_soa: tuple[int, RRset] | None = None  # for which serial
        #: How many changes of names there were, and one.
        self.changes = 1
        # What it was after the last change of each name, or of what is below it; and since when
        # that is known.
        self._changed: dict[Key, int] = {}
        self._known_since = 1
        # By name and by whose they are: several Services may have endpoints of one address.
        self._records: dict[Key, dict[ServiceRef, list[Record]]] = {}
        self._held: dict[ServiceRef, list[Key]] = {}
        self._below: Counter[Key] = Counter()  # names with records below a name of the zone
        self._put(_NOBODY, self._own_records(addresses))

    @property
    def serial(self) -> int:
        """The zone's: another one after each change of names."""
        return self.changes & 0xFFFFFFFF

    def replace(
        self, ref: ServiceRef, service: Service | None, slices: Sequence[EndpointSlice]
    ) -> None:
        """Let the names of a Service be these: ``slices`` are those that name it."""
        has_names = _LABEL.fullmatch(ref.name) and _LABEL.fullmatch(ref.namespace)
        if service is not None and has_names:
            self._put(ref, self._service_records(service, slices))
        else:
            self._put(ref, ())

    def holds(self, keys: Iterable[Key], since: int) -> bool:
        """Whether what was said of these names is still so, said when ``changes`` was ``since``.
        Only the serial of a denial may have become another one.
        """
        return since >= self._known_since and all(
            self._changed.get(key, 0) <= since for key in keys
        )

    def lookup(self, name: Name, rdtype: RdataType) -> Answer | None:
        """What the cluster says of a name; None: it is not of the cluster.

        A name that is an alias is not followed. Owners are spelled as in ``name``.
        """
        key = key_of(name)
        found = self._records.get(key)
        is_inside = self.contains(key)
        if found is None and not is_inside:
            return None
        if key == self._apex and rdtype == RdataType.SOA:
            return Answer(answer=(self._soa(name),), is_own=True)
        if found is None:
            return self._deny(key, Rcode.NOERROR if self._below[key] else Rcode.NXDOMAIN)
        records = [each for held in found.values() for each in held]
        if rdtype == RdataType.ANY:
            rdtype = records[0][0]  # some of them are enough (RFC 8482, 4.1)
        chosen = [each for each in records if each[0] in (rdtype, RdataType.CNAME)]
        if not chosen and is_inside:
            return self._deny(key, Rcode.NOERROR)
        if not chosen:  # the owner of a SOA record is a name at or above
            return Answer(authority=(self._soa(name),), is_own=True)
        if len(chosen) > 1:
            length = len(_rdata(chosen[0]).to_wire() or b"") + RECORD_HEAD
            # In any order: some clients take the first, always.
            chosen = random.sample(chosen, min(len(chosen), ANSWER_MAX // length))
        additional = tuple(self._targets(chosen))
        return Answer(answer=(_rrset(name, chosen),), additional=additional, is_own=True)

    def contains(self, key: Key) -> bool:
        """Whether a name is the zone's, or below."""
        return key[-len(self._apex) :] == self._apex

    def _put(self, ref: ServiceRef, records: Iterable[tuple[Key, Record]]) -> None:
        """Let these be all records of one."""
        after: dict[Key, list[Record]] = {}
        for key, record in records:
            after.setdefault(key, []).append(record)
        before = {key: self._records[key][ref] for key in self._held.get(ref, ())}
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if not changed:
            return
        self.changes += 1
        touched = [self._apex]
        for key in changed:
            touched.append(key)
            if key not in before or key not in after:
                touched += self._count_below(key, 1 if key in after else -1)
            owners = self._records.setdefault(key, {})
            if key in after:
                owners[ref] = after[key]
                continue
            del owners[ref]
            if not owners:
                del self._records[key]
        self._held[ref] = [*after]
        if not after:
            del self._held[ref]
        self._changed.update(dict.fromkeys(touched, self.changes))
        if len(self._changed) > CHANGED_MAX:
            self._changed.clear()
            self._known_since = self.changes

    def _count_below(self, key: Key, number: int) -> list[Key]:
        """One more or less has records of this name: of which others that says something."""
        above = self._above(key)
        for each in above:
            self._below[each] += number
            if not self._below[each]:
                del self._below[each]
        return above

    def _above(self, key: Key) -> list[Key]:
        """The names between a name and the zone's."""
        if not self.contains(key):
            return []
        return [key[depth:] for depth in range(1, len(key) - len(self._apex))]

    def _deny(self, key: Key, rcode: Rcode) -> Answer:
        """A name of the zone has no record, or none of a type."""
        serial, soa = self._zone_soa or (0, None)
        if soa is None or serial != self.serial:
            soa = self._soa(self.zone)
            self._zone_soa = self.serial, soa
        # Names of ours in the SOA record may be compressed by these.
        shares = key[-len(self._apex) - 1 : -len(self._apex)] in ((b"dns",), (b"hostmaster",))
        return Answer(rcode, authority=(soa,), is_own=True, is_denial=not shares)

    def _soa(self, owner: Name) -> RRset:
        times = (_REFRESH, _RETRY, _EXPIRE, TTL)
        soa = (RdataType.SOA, self._server, self._mailbox, self.serial, *times)
        return _rrset(owner, [soa])

    def _targets(self, records: Iterable[Record]) -> Iterator[RRset]:
        """The addresses of what SRV and NS records name, unless they are too many."""
        room = ADDITIONAL_MAX
        targets = dict.fromkeys(
            each[-1] for each in records if each[0] in (RdataType.SRV, RdataType.NS)
        )
        for target in targets if len(targets) <= room else ():
            found = self._records.get(key_of(target), {})
            for kind in (RdataType.A, RdataType.AAAA):
                addresses = [each for held in found.values() for each in held if each[0] == kind]
                room -= len(addresses)
                if addresses and room >= 0:
                    yield _rrset(target, addresses)

    def _own_records(self, addresses: Iterable[str]) -> Iterator[tuple[Key, Record]]:
        yield self._apex, (RdataType.NS, self._server)
        yield (b"dns-version", *self._apex), (RdataType.TXT, (SCHEMA.encode(),))
        for address in addresses:
            yield key_of(self._server), _address(address)

    def _service_records(
        self, service: Service, slices: Iterable[EndpointSlice]
    ) -> Iterator[tuple[Key, Record]]:
        spec, ref = service.spec, service.ref
        name = Name((ref.name.encode(), ref.namespace.encode(), b"svc", *self.zone.labels))
        if spec.type == "ExternalName":
            # CoreDNS gives no name either to what looks like an address.
            if spec.external_name and not _IPV4.fullmatch(spec.external_name):
                target = dns.name.from_text(spec.external_name)
                yield key_of(name), (RdataType.CNAME, target)
        elif spec.cluster_ip == "None":
            yield from _headless(name, service, slices)
        elif spec.cluster_ip:
            for address in cluster_ips(service).values():
                yield key_of(name), _address(address)
                yield _reverse(address), (RdataType.PTR, name)
            for port in spec.ports or ():
                record = _srv(port.port, name)
                yield key_of(name), record  # also of ports without names, as CoreDNS has it
                if port.name:
                    yield _service(name, port.name, port.protocol), record
            # As CoreDNS has it, but for endpoints without a hostname: all Pods would have names.
            for _, endpoint, address in _published(service, slices):
                if endpoint.hostname:
                    target = Name((endpoint.hostname.encode(), *name.labels))
                    yield key_of(target), _address(address)
                    yield _reverse(address), (RdataType.PTR, target)


def key_of(name: Name) -> Key:
    """What is the same for names that differ in case only (RFC 4343)."""
    return tuple([label.lower() for label in name.labels])


def _zone(text: str) -> Name:
    try:
        name = dns.name.from_text(text)
    except dns.name.NameTooLong:
        raise ConfigError(f"{text!r} is too long for a zone") from None
    except (dns.exception.DNSException, UnicodeError):
        raise ConfigError(f"{text!r} is not a zone such as cluster.local") from None
    if name == dns.name.root:
        raise ConfigError("the zone cannot be the root of all names")
    if len(name.to_wire() or b"") > ZONE_MAX:
        raise ConfigError(f"{text!r} is too long for a zone")
    return name


def _headless(
    name: Name, service: Service, slices: Iterable[EndpointSlice]
) -> Iterator[tuple[Key, Record]]:
    """A port is the endpoint's own: clients connect to that, whatever the Service calls it."""
    own: dict[tuple[Name, str], None] = {}
    served: dict[tuple[Key, int, Name], None] = {}
    for each, endpoint, address in _published(service, slices):
        # Without a hostname, one that stays as long as the address does.
        hostname = endpoint.hostname or re.sub("[.:]", "-", address)
        target = Name((hostname.encode(), *name.labels))
        own[target, address] = None
        for port in each.ports or ():
            if port.port:
                served[key_of(name), port.port, target] = None
            if port.port and port.name:
                served[_service(name, port.name, port.protocol), port.port, target] = None
    for address in dict.fromkeys(address for _, address in own):
        yield key_of(name), _address(address)
    for target, address in own:
        yield key_of(target), _address(address)
        yield _reverse(address), (RdataType.PTR, target)
    for key, number, target in served:
        yield key, _srv(number, target)


def _published(
    service: Service, slices: Iterable[EndpointSlice]
) -> Iterator[tuple[EndpointSlice, Endpoint, str]]:
    """The endpoints that are ready, or all, with their addresses."""
    everybody = bool(service.spec.publish_not_ready_addresses)
    for each in slices:
        if each.address_type == "FQDN":
            continue
        for endpoint in each.endpoints or ():
            if endpoint.addresses and (everybody or _is_ready(endpoint)):
                address = parse_address(endpoint.addresses[0])
                if family_of(address) == each.address_type:
                    yield each, endpoint, address


def _is_ready(endpoint: Endpoint) -> bool:
    return endpoint.conditions is None or endpoint.conditions.ready is not False


def _service(name: Name, port: str, protocol: str | None) -> Key:
    """``_port._protocol.name`` (RFC 2782)."""
    return (f"_{port}".encode(), f"_{protocol or 'TCP'}".lower().encode(), *key_of(name))


def _srv(port: int, target: Name) -> Record:
    """Equal weights, not 0: then the first would be everybody's (RFC 2782)."""
    return (RdataType.SRV, 0, 1, port, target)


def _reverse(address: str) -> Key:
    return key_of(dns.reversename.from_address(address))


def _address(address: str) -> Record:
    return (RdataType.AAAA if family_of(address) == "IPv6" else RdataType.A, address)


def _rdata(record: Record) -> Rdata:
    rdtype, *fields = record
    rdata: Rdata = _KINDS[rdtype](_IN, rdtype, *fields)
    return rdata


def _rrset(owner: Name, records: Sequence[Record]) -> RRset:
    rrset = RRset(owner, _IN, records[0][0])
    rrset.ttl = TTL
    # RRset.add() compares each with all: a Service may have thousands of endpoints.
    rrset.items.update(dict.fromkeys(map(_rdata, records)))
    return rrset
