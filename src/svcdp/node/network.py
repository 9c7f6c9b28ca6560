"""The node's network namespace and the addresses in it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from typing import Self

from svcdp.errors import ConflictError
from svcdp.node.values import Address

__all__ = ["NetworkWatch", "claim_netns", "discover_addresses"]

# linux/if_addr.h
IFA_F_OPTIMISTIC, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x04, 0x20, 0x40
MAIN_TABLE = 254  # linux/rtnetlink.h, RT_TABLE_MAIN
#: linux/rtnetlink.h: RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR; RTMGRP_LINK
ADDRESS_GROUPS, LINK_GROUP = 0x10 | 0x100, 0x1
SOL_NETLINK, NETLINK_NO_ENOBUFS = 270, 5  # linux/netlink.h
MESSAGE_MAX = 1 << 15  # bytes; what a netlink datagram has at most


def claim_netns() -> socket.socket:
    """Be the one daemon of this network namespace until the returned socket is closed.

    :class:`svcdp.ConflictError` where there is one already: two would fight over the rules.
    Abstract addresses belong to a namespace, and the kernel frees them after a crash.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        claim.bind("\0svcdp-node-daemon")
    except OSError:
        claim.close()
        raise ConflictError(
            "another svcdp serves this network namespace: stop it, or set netns"
        ) from None
    return claim


def discover_addresses() -> tuple[Address, ...]:
    """Addresses of this namespace's interfaces that others can reach.

    Those of an interface with a default route come first: the first of each family is
    the node's primary one. Must not be called in an event loop's thread (pyroute2 runs
    a loop of its own).
    """
    from pyroute2 import IPRoute  # type: ignore[import-untyped]  # slow, hence late

    with IPRoute() as netlink:
        routes = netlink.get_routes(dst_len=0, table=MAIN_TABLE)
        defaults = {route.get_attr("RTA_OIF") for route in routes}
        entries = [entry for entry in netlink.get_addr() if _is_usable(entry["flags"])]
    entries.sort(key=lambda entry: entry["index"] not in defaults)
    # IFA_ADDRESS is the peer's on point-to-point links; only IPv4 has an IFA_LOCAL everywhere.
    texts = [entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS") for entry in entries]
    addresses = map(ipaddress.ip_address, texts)
    usable = [Address(str(a)) for a in addresses if not (a.is_loopback or a.is_link_local)]
    return tuple(dict.fromkeys(usable))


def _is_usable(flags: int) -> bool:
    """Not one that is going, or of which it is not known, or is known not, to be this host's alone
    (RFC 4862, 5.4): the kernel takes it for no route's source. It tells when that is over.
    """
    if flags & IFA_F_TENTATIVE and not flags & IFA_F_OPTIMISTIC:
        return False
    return not flags & IFA_F_DEPRECATED


class NetworkWatch:
    """Knows that addresses of this namespace's interfaces came or went, or with ``links`` that an
    interface did or changed, not which. A context manager, for one task. What happens from its
    making on is known.
    """

    def __init__(self, *, links: bool = False) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        try:
            # Of more than fits it is enough to know some.
            self._socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
            self._socket.bind((0, LINK_GROUP if links else ADDRESS_GROUPS))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    async def wait(self, settle: float) -> None:
        """Until something happened, and ``settle`` seconds longer for what comes with it."""
        await asyncio.get_running_loop().sock_recv(self._socket, MESSAGE_MAX)
        await asyncio.sleep(settle)
        self.take()

    def take(self) -> bool:
        """Whether something happened that neither this nor :meth:`wait` told of yet."""
        happened = False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(MESSAGE_MAX)
                happened = True
        return happened
