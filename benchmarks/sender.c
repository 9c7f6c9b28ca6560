/* SPDX-License-Identifier: Apache-2.0
 *
 * Sends UDP datagrams of 18 bytes (frames of 60) as fast as the kernel takes them:
 *     sender ADDRESS PORT COUNT FLOWS
 * prints the monotonic ns before the first and after the last.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { GROUP = 64, SIZE = 18, FLOWS_MAX = 256 };

static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv)
{
    static struct mmsghdr messages[GROUP];
    static char payload[SIZE];
    struct iovec piece = {payload, SIZE};
    struct sockaddr_in target = {.sin_family = AF_INET};
    int sockets[FLOWS_MAX];
    if (argc != 5 || inet_pton(AF_INET, argv[1], &target.sin_addr) != 1)
        return 2;
    target.sin_port = htons((unsigned short)atoi(argv[2]));
    long count = atol(argv[3]);
    int flows = atoi(argv[4]);
    if (flows < 1 || flows > FLOWS_MAX)
        return 2;
    for (int i = 0; i < flows; i++) {
        sockets[i] = socket(AF_INET, SOCK_DGRAM, 0);
        if (sockets[i] < 0 || connect(sockets[i], (struct sockaddr *)&target, sizeof target)) {
            perror("connect");
            return 1;
        }
    }
    for (int i = 0; i < GROUP; i++) {
        messages[i].msg_hdr.msg_iov = &piece;
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    long long start = now();
    for (long sent = 0, turn = 0; sent < count; turn++) {
        long left = count - sent;
        int done = sendmmsg(sockets[turn % flows], messages, left < GROUP ? left : GROUP, 0);
        if (done < 0) {
            perror("sendmmsg");
            return 1;
        }
        sent += done;
    }
    printf("%lld %lld\n", start, now());
    return 0;
}
