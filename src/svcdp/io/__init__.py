"""Packets in and out: the kernel's queues, other people's loops, capture files, TUN devices."""
