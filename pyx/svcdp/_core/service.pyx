"""Virtual services, per change: built from what the dataplane compiled, and freed."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from svcdp._core.conn cimport CONN_CLAMP, CONN_ONE_WAY, CONN_WATCHED
from svcdp._core.memory cimport htons
from svcdp._core.sched cimport forget
from svcdp._core.service cimport *


cdef void *allocate(size_t count, size_t size) except NULL:
    cdef void *memory = calloc(count if count else 1, size)
    if memory is NULL:
        raise MemoryError(f"cannot allocate {count * size} bytes for a service")
    return memory


cdef int copy_bytes(uint8_t *to, bytes source) except -1:
    """At most 16 bytes: an address or a mask."""
    if PyBytes_GET_SIZE(source) > 16:
        raise ValueError("an address has 4 or 16 bytes")
    memcpy(to, PyBytes_AS_STRING(source), PyBytes_GET_SIZE(source))
    return 0


cdef int fill_rules(
    Service *service, tuple rules, DestinationTable *destinations
) except -1:
    """`rules`: (networks or None, masquerade, on_empty verdict, answer, mark, record of its subset
    or None), networks of (address, mask).
    """
    cdef Rule *rule
    cdef uint32_t i, j
    service.rules = <Rule *>allocate(len(rules), sizeof(Rule))
    service.rule_count = <uint32_t>len(rules)
    for i, (networks, masquerade, on_empty, answer, mark, subset) in enumerate(rules):
        rule = &service.rules[i]
        rule.masquerade = masquerade
        rule.on_empty = on_empty
        rule.answer = answer
        rule.mark = mark
        if subset is not None:
            rule.subset = service_new(subset, destinations)
        if networks is None:
            continue
        rule.networks = <Network *>allocate(len(networks), sizeof(Network))
        rule.network_count = <uint32_t>len(networks)
        for j, (address, mask) in enumerate(networks):
            copy_bytes(rule.networks[j].address, address)
            copy_bytes(rule.networks[j].mask, mask)
    return 0


cdef int fill(Service *service, object record, DestinationTable *destinations) except -1:
    cdef uint32_t i
    cdef Member *member
    copy_bytes(service.address, record.address)
    service.port = htons(record.port)
    service.first_port = record.port
    service.last_port = record.last_port
    service.words = record.words
    service.protocol = record.protocol
    service.scheduler = record.scheduler
    service.scheduler_flags = record.scheduler_flags
    service.table_size = record.table_size
    service.affinity = record.affinity
    service.persistence = record.persistence
    service.is_timed = record.is_timed
    copy_bytes(service.netmask, record.netmask)
    service.engine = record.engine
    service.one_packet = record.one_packet
    service.timeouts = record.timeouts
    service.on_removal = record.on_removal
    service.grace = record.grace
    service.is_passive = record.failures_max > 0
    service.failures_max = record.failures_max
    service.ejection = record.ejection
    service.ejection_max = record.ejection_max
    if service.on_removal != REMOVAL_DRAIN:
        service.flags[0] |= CONN_WATCHED
    if record.mss_clamp:
        service.flags[0] |= CONN_CLAMP
    service.flags[1] = CONN_WATCHED
    if service.one_packet:
        service.flags[1] |= CONN_ONE_WAY
    service.is_ftp = record.is_ftp
    service.is_attended = service.is_ftp or service.is_passive
    if record.masquerade is not None:
        service.has_masquerade = True
        copy_bytes(service.masquerade, record.masquerade)
    fill_rules(service, record.rules, destinations)
    service.members = <Member *>allocate(len(record.members), sizeof(Member))
    service.member_count = <uint32_t>len(record.members)
    for i, (id, weight, *_) in enumerate(record.members):
        member = &service.members[i]
        member.destination = dest_of(destinations, id)
        member.weight = weight
        member.weight_below = <uint32_t>service.weight_total
        service.weight_total += member.weight
    if service.weight_total > 0xffffffff:
        raise OverflowError("the weights of a service add up to more than 2^32 - 1")
    service.state.position = -1
    if record.chooser is not None:
        service.chooser = <PyObject *>record.chooser
        service.candidates = <PyObject *>record.candidates
    return 0


cdef Service *service_new(object record, DestinationTable *destinations) except NULL:
    """A service from a compiled record (see `svcdp.records`). The caller owns it, and keeps the
    record's chooser and candidates for as long.
    """
    cdef Service *service = <Service *>allocate(1, sizeof(Service))
    try:
        fill(service, record, destinations)
    except BaseException:
        service_free(service)
        raise
    return service


cdef void service_free(Service *service) noexcept:
    cdef uint32_t i
    if service.rules is not NULL:
        for i in range(service.rule_count):
            free(service.rules[i].networks)
            if service.rules[i].subset is not NULL:
                service_free(service.rules[i].subset)
    forget(service)
    free(service.rules)
    free(service.members)
    free(service)
