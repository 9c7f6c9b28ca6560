/* SPDX-License-Identifier: Apache-2.0
 *
 * The yardstick of the benchmarks: plain C loops that do the work of a NAT packet and nothing
 * else. No locks, no states, no timeouts, no counters, no IPv6, no options; what svcdp costs
 * above them is what those cost. Built by reference.py on the machine that measures, never
 * shipped. Also the packet generator that both sides are fed by.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { BURST = 64, HEADERS = 40, TCP = 6, SYN = 2, ACK = 16 };

/* One direction of a flow. All in wire order; 32 bytes. */
struct entry {
    uint32_t source, destination;
    uint16_t source_port, destination_port;
    uint16_t new_port;
    uint8_t protocol;      /* 0: empty */
    uint8_t reply;         /* rewrites the source instead of the destination */
    uint32_t new_address;
    uint16_t ip_delta, transport_delta;
    uint32_t seen;
    uint32_t unused;
};

struct service {
    uint32_t address;
    uint16_t port;
    uint8_t protocol;      /* 0: empty */
    uint32_t next, count;  /* round robin */
    struct destination { uint32_t address; uint16_t port; } *destinations;
};

struct table {
    struct entry *entries;
    struct service *services;
    uint32_t mask, service_mask;
    int replies;           /* new flows also get an entry for their replies */
};

static uint16_t load16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static uint32_t load32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static void store16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }
static void store32(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }

static uint16_t fold(uint64_t sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static uint64_t mix(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint32_t hash(uint32_t source, uint32_t destination, uint32_t ports, uint8_t protocol)
{
    uint64_t addresses = source | (uint64_t)destination << 32;
    return (uint32_t)mix(addresses ^ 0x9E3779B97F4A7C15,
                         (ports | (uint64_t)protocol << 32) ^ 0xBF58476D1CE4E5B9);
}

/* -- tables ----------------------------------------------------------------------------------- */

static void *pages(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        abort();
    madvise(memory, size, MADV_HUGEPAGE);
    memset(memory, 0, size);
    return memory;
}

/* Room for so many entries at a load of at most 1/2. */
struct table *reference_new(uint32_t entries, uint32_t services, int replies)
{
    struct table *table = calloc(1, sizeof(*table));
    uint32_t size = 64;
    while (size < 2 * entries)
        size <<= 1;
    table->mask = size - 1;
    table->replies = replies;
    table->entries = pages((size_t)size * sizeof(struct entry));
    for (size = 64; size < 2 * services; size <<= 1)
        ;
    table->service_mask = size - 1;
    table->services = calloc(size, sizeof(struct service));
    return table;
}

void reference_clear(struct table *table)
{
    memset(table->entries, 0, ((size_t)table->mask + 1) * sizeof(struct entry));
}

void reference_free(struct table *table)
{
    for (uint32_t i = 0; i <= table->service_mask; i++)
        free(table->services[i].destinations);
    munmap(table->entries, ((size_t)table->mask + 1) * sizeof(struct entry));
    free(table->services);
    free(table);
}

static struct service *find_service(struct table *table, uint32_t address, uint16_t port)
{
    uint32_t i = hash(address, address, port, TCP) & table->service_mask;
    for (;; i = (i + 1) & table->service_mask) {
        struct service *service = &table->services[i];
        if (!service->protocol
            || (service->address == address && service->port == port))
            return service;
    }
}

/* Add a service, or replace its destinations: `count` of them from `first` on. */
void reference_service(
    struct table *table, uint32_t address, uint16_t port, uint32_t first, uint32_t count)
{
    struct service *service = find_service(table, htonl(address), htons(port));
    struct destination *old = service->destinations;
    struct destination *fresh = malloc(count * sizeof(*fresh));
    for (uint32_t i = 0; i < count; i++)
        fresh[i] = (struct destination){htonl(first + i), htons(8080)};
    service->address = htonl(address);
    service->port = htons(port);
    service->protocol = TCP;
    service->count = count;
    __atomic_store_n(&service->destinations, fresh, __ATOMIC_RELEASE);
    free(old);
}

/* -- packets ---------------------------------------------------------------------------------- */

struct parsed {
    uint32_t hash;
    uint32_t source, destination, ports;
};

/* The pass over a burst that starts all memory accesses. */
static int parse(const struct table *table, const uint8_t *p, uint32_t length, struct parsed *out)
{
    if (length < HEADERS || p[0] != 0x45 || load16(p + 6) & htons(0x3fff)
        || ntohs(load16(p + 2)) > length || p[9] != TCP)
        return 0;
    out->source = load32(p + 12);
    out->destination = load32(p + 16);
    out->ports = load32(p + 20);
    out->hash = hash(out->source, out->destination, out->ports, TCP);
    __builtin_prefetch(&table->entries[out->hash & table->mask], 1, 3);
    return 1;
}

static struct entry *find(const struct table *table, const struct parsed *flow)
{
    uint32_t i = flow->hash & table->mask;
    for (;; i = (i + 1) & table->mask) {
        struct entry *entry = &table->entries[i];
        uint32_t ports = entry->source_port | (uint32_t)entry->destination_port << 16;
        if (!entry->protocol
            || (entry->source == flow->source && entry->destination == flow->destination
                && ports == flow->ports && entry->protocol == TCP))
            return entry;
    }
}

static void rewrite(uint8_t *p, struct entry *entry, uint32_t now)
{
    if (entry->reply) {
        store32(p + 12, entry->new_address);
        store16(p + 20, entry->new_port);
    } else {
        store32(p + 16, entry->new_address);
        store16(p + 22, entry->new_port);
    }
    store16(p + 10, ~fold((uint64_t)(uint16_t)~load16(p + 10) + entry->ip_delta));
    store16(p + 36, ~fold((uint64_t)(uint16_t)~load16(p + 36) + entry->transport_delta));
    entry->seen = now;
}

/* Service, round robin, entry. NULL: no such service. */
static struct entry *insert(struct table *table, const struct parsed *flow, struct entry *empty)
{
    uint16_t client_port = (uint16_t)flow->ports, port = (uint16_t)(flow->ports >> 16);
    struct service *service = find_service(table, flow->destination, port);
    if (!service->protocol)
        return NULL;
    service->next = service->next + 1 < service->count ? service->next + 1 : 0;
    struct destination *to = &service->destinations[service->next];
    uint64_t ip = (uint64_t)(uint32_t)~flow->destination + to->address;
    uint64_t transport = ip + (uint16_t)~port + to->port;
    *empty = (struct entry){
        .source = flow->source, .destination = flow->destination, .source_port = client_port,
        .destination_port = port, .new_port = to->port, .protocol = TCP,
        .new_address = to->address, .ip_delta = fold(ip), .transport_delta = fold(transport)};
    if (!table->replies)
        return empty;
    uint32_t ports = to->port | (uint32_t)client_port << 16;
    struct parsed back = {
        hash(to->address, flow->source, ports, TCP), to->address, flow->source, ports};
    struct entry *reply = find(table, &back);
    *reply = (struct entry){
        .source = to->address, .destination = flow->source, .source_port = to->port,
        .destination_port = client_port, .new_port = port, .protocol = TCP, .reply = 1,
        .new_address = flow->destination, .ip_delta = ~fold(ip),
        .transport_delta = ~fold(transport)};
    return empty;
}

static uint32_t burst(
    struct table *table, uint8_t *packets, uint32_t stride, const uint32_t *lengths,
    uint32_t count, uint32_t now)
{
    struct parsed flows[BURST];
    uint8_t known[BURST];
    uint32_t rewritten = 0;
    for (uint32_t i = 0; i < count; i++)
        known[i] = parse(table, packets + (size_t)i * stride, lengths[i], &flows[i]);
    for (uint32_t i = 0; i < count; i++) {
        if (!known[i])
            continue;
        struct entry *entry = find(table, &flows[i]);
        if (!entry->protocol && !(entry = insert(table, &flows[i], entry)))
            continue;
        rewrite(packets + (size_t)i * stride, entry, now);
        rewritten++;
    }
    return rewritten;
}

/* `count` packets, the first at `packets`, one every `stride` bytes. How many were rewritten. */
uint32_t reference_run(
    struct table *table, uint8_t *packets, uint32_t stride, const uint32_t *lengths,
    uint32_t count, uint32_t now)
{
    uint32_t rewritten = 0;
    for (uint32_t done = 0; done < count; done += BURST)
        rewritten += burst(
            table, packets + (size_t)done * stride, stride, lengths + done,
            count - done < BURST ? count - done : BURST, now);
    return rewritten;
}

static uint64_t clock_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* The ns that reference_run() takes, a reading of the clock included. */
uint64_t reference_time(
    struct table *table, uint8_t *packets, uint32_t stride, const uint32_t *lengths,
    uint32_t count, uint32_t now)
{
    uint64_t start = clock_ns();
    reference_run(table, packets, stride, lengths, count, now);
    return clock_ns() - start;
}

/* The same for no work at all. */
uint64_t reference_time_nothing(void)
{
    uint64_t start = clock_ns();
    return clock_ns() - start;
}

/* -- the generator ---------------------------------------------------------------------------- */

static void write_packet(uint8_t *p, uint32_t length, uint32_t flow, uint32_t services, uint8_t flags)
{
    static const uint8_t template[HEADERS] = {
        0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, TCP, [20] = 0, [32] = 0x50, [34] = 0xff, 0xff};
    uint64_t sum = 0;
    memcpy(p, template, HEADERS);
    store16(p + 2, htons((uint16_t)length));
    store32(p + 12, htonl(0x0b000000 + flow));
    store32(p + 16, htonl(0x0a600001 + flow % services));
    store16(p + 20, htons((uint16_t)(1024 + (flow * 40503u & 0x7fff))));
    store16(p + 22, htons(80));
    p[33] = flags;
    for (uint32_t i = 0; i < 20; i += 4)
        sum += load32(p + i);
    store16(p + 10, ~fold(sum));
    /* The payload is zeros. */
    sum = (uint64_t)load32(p + 12) + load32(p + 16) + htons(TCP) + htons((uint16_t)(length - 20));
    for (uint32_t i = 20; i < HEADERS; i += 4)
        sum += load32(p + i);
    store16(p + 36, ~fold(sum));
}

/* Write the headers of `count` packets: of the flows from `first` on or, with a `random` state,
 * of any of the first `flows`. SYNs or ACKs. */
void reference_packets(
    uint8_t *packets, uint32_t stride, const uint32_t *lengths, uint32_t count, uint32_t first,
    uint32_t flows, uint64_t *random, uint32_t services, int syn)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t flow = first + i;
        if (random) {
            *random += 0x9E3779B97F4A7C15;
            flow = (uint32_t)(((mix(*random, 0xBF58476D1CE4E5B9) >> 32) * flows) >> 32);
        }
        write_packet(packets + (size_t)i * stride, lengths[i], flow, services, syn ? SYN : ACK);
    }
}
