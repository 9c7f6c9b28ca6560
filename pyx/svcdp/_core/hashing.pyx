"""The tables of schedulers that hash, built per change."""

from math import gcd

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free

from svcdp._core.hashing cimport *
from svcdp._core.memory cimport ntohs

cdef enum:
    MEMBERS_MAX = 65536        # that an entry can name

# A member on its way through the table, as in the Maglev paper.
cdef struct Turn:
    uint32_t position          # where it looks for a free entry next
    uint32_t skip
    uint32_t turns             # entries in a row


cdef HashTable *new_table(uint32_t size) except NULL:
    cdef HashTable *table = <HashTable *>calloc(
        1, sizeof(HashTable) + (size - 1) * sizeof(uint16_t))
    if table is NULL:
        raise MemoryError(f"cannot allocate a table of {size} entries")
    table.references = 1
    table.size = size
    return table


cdef void release_table(HashTable *table) noexcept:
    if table is not NULL:
        table.references -= 1
        if table.references == 0:
            free(table)


cdef list entry_ids(const Service *service):
    """The table as ids of destinations."""
    cdef const HashTable *table = <const HashTable *>service.state.table
    cdef uint32_t i
    if table is NULL:
        return []
    return [service.members[table.entries[i]].destination.id for i in range(table.size)]


cdef HashTable *sh_table(const Service *service) except? NULL:
    """Weight after weight of entries to the members in turn, and one to those of weight 0."""
    cdef HashTable *table
    cdef uint32_t i, member = 0, taken = 0
    if service.member_count == 0:
        return NULL
    table = new_table(BUCKETS)
    for i in range(BUCKETS):
        table.entries[i] = <uint16_t>member
        taken += 1
        if taken >= service.members[member].weight:
            member = member + 1 if member + 1 < service.member_count else 0
            taken = 0
    return table


cdef bint has_shares_of(const Service *service, const Service *before) noexcept:
    """Whether the table of `before` would come out again."""
    cdef uint32_t i
    if (
        before.table_size != service.table_size
        or before.member_count != service.member_count
    ):
        return False
    for i in range(service.member_count):
        if (
            before.members[i].destination != service.members[i].destination
            or before.members[i].last_weight != service.members[i].last_weight
        ):
            return False
    return True


cdef HashTable *mh_table(const Service *service, const Service *before) except? NULL:
    """Maglev hashing: members in turn take their next preferred entry that is free, until none
    is. Weights count as they were before a member was quiesced, so that this moves nobody else.
    `before` has the same scheduler, or is NULL. NULL when no member ever had a weight.
    OverflowError when there are more members than entries.
    """
    cdef HashTable *table
    cdef Turn *turns
    cdef uint8_t *taken
    cdef uint32_t size = service.table_size
    cdef uint32_t count = service.member_count
    cdef uint32_t divisor, heaviest, shift
    cdef list weights
    if count > min(size, MEMBERS_MAX):
        raise OverflowError(
            f"{count} destinations are more than a table of mh_table_size {size} has room for")
    if before is not NULL and has_shares_of(service, before):
        table = <HashTable *>before.state.table
        if table is not NULL:
            table.references += 1
        return table
    weights = [service.members[i].last_weight for i in range(count)]
    divisor = gcd(*weights)
    if divisor == 0:
        return NULL
    # Great weights are scaled down, so that turns stay short beside the table.
    heaviest = max(weights) // divisor
    shift = max(int(heaviest).bit_length() - int(size).bit_length() // 2, 0)
    turns = <Turn *>calloc(count, sizeof(Turn))
    taken = <uint8_t *>calloc(size // 8 + 1, 1)
    try:
        if turns is NULL or taken is NULL:
            raise MemoryError(f"cannot allocate the turns of {count} destinations")
        for i in range(count):
            if weights[i]:
                turns[i].turns = max(weights[i] // divisor >> shift, 1)
                prefer(service.members[i].destination, service.words, size, &turns[i])
        table = new_table(size)
        populate(table, turns, count, taken)
    finally:
        free(turns)
        free(taken)
    return table


cdef void prefer(const Dest *destination, uint32_t words, uint32_t size, Turn *turn) noexcept:
    """Where a destination's permutation of the entries starts, and its step."""
    cdef uint32_t number = fold(destination.address, words) + ntohs(destination.port)
    turn.position = maglev_hash(number, MAGLEV_KEY) % size
    turn.skip = maglev_hash(number, MAGLEV_SKIP_KEY) % (size - 1) + 1


cdef void populate(HashTable *table, Turn *turns, uint32_t count, uint8_t *taken) noexcept:
    """`taken`: a bit for each entry, all 0. Much smaller than the table, it stays in the cache."""
    cdef uint32_t size = table.size
    cdef uint32_t filled = 0, member, _
    cdef Turn *turn
    while filled < size:
        for member in range(count):
            turn = &turns[member]
            for _ in range(min(turn.turns, size - filled)):
                while taken[turn.position >> 3] >> (turn.position & 7) & 1:
                    turn.position += turn.skip
                    if turn.position >= size:
                        turn.position -= size
                taken[turn.position >> 3] |= <uint8_t>(1 << (turn.position & 7))
                table.entries[turn.position] = <uint16_t>member
                filled += 1
                table.sharers = max(table.sharers, member + 1)
