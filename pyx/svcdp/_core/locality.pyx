"""The memory of lblc and lblcr, per change."""

from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free

from svcdp._core.locality cimport *


cdef Locality *new_locality() except NULL:
    # Pages that are never written take no memory.
    cdef Locality *locality = <Locality *>calloc(1, sizeof(Locality))
    if locality is NULL:
        raise MemoryError("cannot allocate the memory of a scheduler")
    locality.references = 1
    return locality


cdef void release_locality(Locality *locality) noexcept:
    """For one Service less; the last one's servers are let go."""
    cdef uint32_t i
    if locality is NULL:
        return
    locality.references -= 1
    if locality.references:
        return
    for i in range(LOCALITY_BUCKETS):
        while locality.buckets[i]:
            drop_place(locality, &locality.buckets[i])
    free(locality)
