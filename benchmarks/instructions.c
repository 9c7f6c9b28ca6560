/* SPDX-License-Identifier: Apache-2.0
 *
 * The C loop for instructions.py to count: batches of known flows, or ("new") of new ones.
 */
#include "reference.c"

int main(int argc, char **argv)
{
    enum { STRIDE = 2048, FLOWS = 1024 };
    static uint8_t packets[BURST * STRIDE];
    static uint32_t lengths[BURST];
    int fresh = strcmp(argv[1], "new") == 0;
    uint32_t rounds = (uint32_t)atoi(argv[argc - 1]);
    uint64_t random = 1;
    /* Called as it stands, so that callgrind sees where it begins. */
    uint32_t (*volatile run)(
        struct table *, uint8_t *, uint32_t, const uint32_t *, uint32_t, uint32_t) = reference_run;
    struct table *table = reference_new(1 << 15, 1, fresh);
    reference_service(table, 0x0a600001, 80, 0x0a800001, 10);
    for (uint32_t i = 0; i < BURST; i++)
        lengths[i] = i % 2 ? 1500 : 64;
    for (uint32_t first = 0; first < FLOWS && !fresh; first += BURST) {
        reference_packets(packets, STRIDE, lengths, BURST, first, 0, NULL, 1, 1);
        run(table, packets, STRIDE, lengths, BURST, 1);
    }
    for (uint32_t i = 0; i < rounds; i++) {
        reference_packets(
            packets, STRIDE, lengths, BURST, i * BURST, FLOWS, fresh ? NULL : &random, 1, fresh);
        run(table, packets, STRIDE, lengths, BURST, 1);
    }
    reference_free(table);
}
