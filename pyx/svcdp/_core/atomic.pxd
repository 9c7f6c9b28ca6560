# C11 atomics with the orders that the core needs, a spin lock, and prefetch.
#
# The spin lock guards a few dozen instructions at most, is never held across a call into
# Python, and yields the processor when its holder seems to have lost it.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #ifndef SVCDP_ATOMIC_H
    #define SVCDP_ATOMIC_H
    #include <sched.h>
    #include <stdint.h>

    #define svcdp_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define svcdp_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define svcdp_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define svcdp_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define svcdp_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
    #define svcdp_add(p, v) __atomic_add_fetch((p), (v), __ATOMIC_RELAXED)
    #define svcdp_load_ordered(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
    #define svcdp_add_ordered(p, v) __atomic_add_fetch((p), (v), __ATOMIC_SEQ_CST)
    #define svcdp_or(p, v) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
    #define svcdp_and(p, v) __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST)
    #define svcdp_likely(x) __builtin_expect(!!(x), 1)
    #define svcdp_unlikely(x) __builtin_expect(!!(x), 0)
    #define svcdp_prefetch(p) __builtin_prefetch((p), 1, 3)
    /* The function f, which the compiler does not know again: it is called, and the caller stays
       as small as if there were none. */
    #define svcdp_aside(f) \\
        (__extension__({ __typeof__(f) svcdp_f = (f); __asm__("" : "+r"(svcdp_f)); svcdp_f; }))

    /* Out of line: few ever wait, and none should pay for it with registers. */
    static __attribute__((noinline, cold, unused)) void svcdp_spin_wait(uint8_t *lock)
    {
        unsigned spins = 0;
        do {
            while (__atomic_load_n(lock, __ATOMIC_RELAXED)) {
                if (++spins & 63) {
    #if defined(__x86_64__) || defined(__i386__)
                    __builtin_ia32_pause();
    #endif
                } else {
                    sched_yield();
                }
            }
        } while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE));
    }

    static inline void svcdp_spin_lock(uint8_t *lock)
    {
        if (svcdp_unlikely(__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE)))
            svcdp_spin_wait(lock);
    }

    static inline int svcdp_spin_trylock(uint8_t *lock)
    {
        return !__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE);
    }

    static inline void svcdp_spin_unlock(uint8_t *lock)
    {
        __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
    }
    #endif
    """
    uint8_t load_u8 "svcdp_load"(const uint8_t *p)
    uint16_t load_u16 "svcdp_load"(const uint16_t *p)
    uint32_t load_u32 "svcdp_load"(const uint32_t *p)
    uint32_t load_acquire_u32 "svcdp_load_acquire"(const uint32_t *p)
    uint64_t load_u64 "svcdp_load"(const uint64_t *p)
    uint64_t load_acquire_u64 "svcdp_load_acquire"(const uint64_t *p)
    int32_t load_i32 "svcdp_load"(const int32_t *p)
    int64_t load_i64 "svcdp_load"(const int64_t *p)
    # Sequentially consistent, for who publishes one thing and then looks at another.
    uint8_t load_ordered_u8 "svcdp_load_ordered"(const uint8_t *p)
    int32_t load_ordered_i32 "svcdp_load_ordered"(const int32_t *p)
    uint64_t load_ordered_u64 "svcdp_load_ordered"(const uint64_t *p)
    void *load_ordered_ptr "svcdp_load_ordered"(void **p)
    uint64_t add_ordered_u64 "svcdp_add_ordered"(uint64_t *p, uint64_t v)
    void store_u8 "svcdp_store"(uint8_t *p, uint8_t v)
    void store_u16 "svcdp_store"(uint16_t *p, uint16_t v)
    void store_u32 "svcdp_store"(uint32_t *p, uint32_t v)
    void store_i64 "svcdp_store"(int64_t *p, int64_t v)
    void store_release_u32 "svcdp_store_release"(uint32_t *p, uint32_t v)
    void store_release_u64 "svcdp_store_release"(uint64_t *p, uint64_t v)
    uint8_t exchange_u8 "svcdp_exchange"(uint8_t *p, uint8_t v)
    uint64_t exchange_u64 "svcdp_exchange"(uint64_t *p, uint64_t v)
    void *exchange_ptr "svcdp_exchange"(void **p, void *v)
    # Bits of a byte that several threads change; they return what it was.
    uint8_t or_u8 "svcdp_or"(uint8_t *p, uint8_t v)
    uint8_t and_u8 "svcdp_and"(uint8_t *p, uint8_t v)
    uint32_t add_u32 "svcdp_add"(uint32_t *p, uint32_t v)
    int32_t add_i32 "svcdp_add_ordered"(int32_t *p, int32_t v)
    # Where the road of most packets goes: the rest stays out of its instructions and registers.
    bint likely "svcdp_likely"(bint condition)
    bint unlikely "svcdp_unlikely"(bint condition)
    void prefetch "svcdp_prefetch"(const void *p)
    void spin_lock "svcdp_spin_lock"(uint8_t *lock)
    bint spin_trylock "svcdp_spin_trylock"(uint8_t *lock)
    void spin_unlock "svcdp_spin_unlock"(uint8_t *lock)
