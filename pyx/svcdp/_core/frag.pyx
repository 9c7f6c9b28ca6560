"""Packets that arrive in fragments, per process: the table's memory."""

from libc.stdlib cimport calloc, free

from svcdp._core.frag cimport *


cdef int fragment_table_init(FragmentTable *table) except -1:
    """An empty table; pages that no fragment needs take no memory."""
    table.buckets = <FragmentBucket *>calloc(FRAGMENT_BUCKETS, sizeof(FragmentBucket))
    if table.buckets is NULL:
        raise MemoryError("cannot allocate the table of fragments")
    return 0


cdef void fragment_table_free(FragmentTable *table) noexcept:
    free(table.buckets)
    table.buckets = NULL
