"""The connection table, per process: its memory."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from svcdp._core.conn cimport *

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MADV_HUGEPAGE
    void *MAP_FAILED

cdef enum:
    SLOTS_PER_RECORD = 4       # two are used: at most half full
    FIRST_RECORDS = 1 << 15    # whose memory is there before it is needed
    POPULATE_WRITE = 23        # MADV_POPULATE_WRITE, which older headers lack (Linux 5.14)
    STRIPE_SLOTS_MIN = 4096
    STRIPES_MAX = 64


cdef void *reserve(size_t size) except NULL:
    """Zeroed address space. Only pages that are written take memory."""
    cdef void *memory = mmap(
        NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if memory == MAP_FAILED:
        raise MemoryError(f"cannot reserve {size} bytes for the connection table")
    madvise(memory, size, MADV_HUGEPAGE)
    return memory


cdef void give_back(void *memory, size_t size) noexcept:
    """Undo reserve(); NULL is nothing."""
    if memory is not NULL:
        munmap(memory, size)


cdef int table_init(Table *table, uint32_t limit) except -1:
    """Room for `limit` connections of either family together. `table` is overwritten."""
    cdef uint32_t slots = 1
    cdef uint32_t stripes
    cdef int i
    memset(table, 0, sizeof(Table))
    while slots < SLOTS_PER_RECORD * limit:
        slots <<= 1
    stripes = min(max(slots // STRIPE_SLOTS_MIN, 1), STRIPES_MAX)
    if slots < 64:
        slots = 64
    table.limit = limit
    table.mask = slots - 1
    table.stripe_mask = slots // stripes - 1
    table.stripe_shift = (slots // stripes).bit_length() - 1
    try:
        table.slots = <uint64_t *>reserve(slots * sizeof(uint64_t))
        table.pools[0].records = <uint8_t *>reserve((<size_t>limit + 1) * RECORD_V4)
        table.pools[1].records = <uint8_t *>reserve((<size_t>limit + 1) * RECORD_V6)
        table.stripes = <Stripe *>calloc(stripes, sizeof(Stripe))
        if table.stripes is NULL:
            raise MemoryError("cannot allocate the stripes of the connection table")
    except BaseException:
        table_free(table)
        raise
    for i in range(2):
        table.pools[i].fresh = 1
    return 0


cdef void table_populate(Table *table) noexcept nogil:
    """Have the memory that connections will soon take, so that no packet waits for it: zeroing a
    huge page takes as long as some hundred packets. Where the kernel cannot, packets do.
    """
    cdef size_t records = min(table.limit + 1, <uint32_t>FIRST_RECORDS)
    madvise(table.slots, (<size_t>table.mask + 1) * sizeof(uint64_t), POPULATE_WRITE)
    madvise(table.pools[0].records, records * RECORD_V4, POPULATE_WRITE)
    madvise(table.pools[1].records, records * RECORD_V6, POPULATE_WRITE)


cdef void table_free(Table *table) noexcept:
    cdef int i
    for i in range(2):
        give_back(
            table.pools[i].records, (<size_t>table.limit + 1) * (RECORD_V6 if i else RECORD_V4))
    give_back(table.slots, (<size_t>table.mask + 1) * sizeof(uint64_t))
    free(table.stripes)
    memset(table, 0, sizeof(Table))
