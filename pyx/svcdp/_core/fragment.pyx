"""Cutting packets that are longer than a link takes: for gateways that send by themselves what a
dataplane gave them.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from svcdp._core.checksum cimport plain_checksum
from svcdp._core.hop cimport IP_DF
from svcdp._core.memory cimport htons, load16, ntohs, store16
from svcdp._core.packet cimport *
from svcdp._core.tunnel cimport IPV4_MIN_MTU, IPV6_MIN_MTU

import secrets
import struct

cdef enum:
    OPTION_END = 0             # RFC 791, 3.1
    OPTION_NOP = 1
    OPTION_COPIED = 0x80
    IP_MF = 0x2000             # of the word that also has the offset
    IP_OFFSET = 0x1fff


def fragment(packet, uint32_t mtu, identification=None):
    """The IP packets (bytes) of `mtu` bytes at most that carry this packet: RFC 791, RFC 8200.

    `packet`: a buffer with one IP packet; bytes behind it are left out. `identification`: of the
    IPv6 packet, 32 bits that are new to its pair of addresses; random when None. A packet that
    fits comes out alone and as it is. ValueError: it is no whole IP packet, is IPv4 with DF or an
    IPv6 fragment already, or the MTU is below the least of IPv4 (68) or IPv6 (1280).
    """
    cdef bytes data = bytes(packet)
    cdef const uint8_t *ip = data
    cdef uint32_t header, total
    if len(data) >= 20 and ip[0] >> 4 == 4:
        header, total, least = (ip[0] & 15) * 4, ntohs(load16(ip + 2)), IPV4_MIN_MTU
    elif len(data) >= 40 and ip[0] >> 4 == 6:
        header, total, least = 40, 40 + ntohs(load16(ip + 4)), IPV6_MIN_MTU
    else:
        raise ValueError("not an IP packet: it cannot be fragmented")
    if not 20 <= header <= total <= len(data):
        raise ValueError(f"an IP packet of {total} bytes, of which {len(data)} are there")
    if mtu < least:
        raise ValueError(f"MTU {mtu} is below {least}, the least of IPv{ip[0] >> 4}")
    data = data[:total]
    if total <= mtu:
        return [data]
    return fragment4(data, header, mtu) if least == IPV4_MIN_MTU else \
        fragment6(data, mtu, identification)


cdef bytes copied_options(const uint8_t *options, uint32_t length):
    """The options that later fragments have, padded to whole words."""
    cdef uint32_t at = 0, size
    cdef bytes result = b""
    while at < length and options[at] != OPTION_END:
        if options[at] == OPTION_NOP:
            at += 1
            continue
        if at + 1 >= length or not 2 <= options[at + 1] <= length - at:
            break              # the rest means nothing
        size = options[at + 1]
        if options[at] & OPTION_COPIED:
            result += options[at:at + size]
        at += size
    return result + bytes(-len(result) % 4)


cdef list fragment4(bytes packet, uint32_t header, uint32_t mtu):
    """It may be a fragment itself."""
    cdef const uint8_t *ip = packet
    cdef uint32_t at = header, size
    cdef uint32_t total = <uint32_t>len(packet)
    cdef uint16_t field = ntohs(load16(ip + 6))
    cdef bytearray piece
    cdef bytes options = packet[20:header]
    cdef list pieces = []
    cdef uint8_t *out
    if ip[6] & IP_DF:
        raise ValueError(f"an IPv4 packet of {total} bytes has DF: it must not be fragmented")
    if (field & IP_OFFSET) * 8 + total > 0xffff:
        raise ValueError("an IPv4 fragment that ends behind the greatest packet")
    while at < total:
        size = total - at
        if 20 + len(options) + size > mtu:
            size = (mtu - 20 - <uint32_t>len(options)) & ~<uint32_t>7
        piece = bytearray(packet[:20] + options + packet[at:at + size])
        out = piece
        out[0] = 0x40 | <uint8_t>(5 + len(options) // 4)
        store16(out + 2, htons(<uint16_t>len(piece)))
        store16(out + 6, htons(<uint16_t>(
            (field & ~IP_OFFSET) | (IP_MF if at + size < total else 0)
            | ((field & IP_OFFSET) + (at - header) // 8))))
        store16(out + 10, 0)
        store16(out + 10, plain_checksum(out, 20 + <uint32_t>len(options)))
        pieces.append(bytes(piece))
        if at == header:
            options = copied_options(ip + 20, header - 20)
        at += size
    return pieces


cdef list fragment6(bytes packet, uint32_t mtu, object identification):
    cdef const uint8_t *ip = packet
    cdef uint32_t total = <uint32_t>len(packet)
    cdef uint32_t end = 40, at = 40, size, room
    cdef uint32_t last = 6     # where the type of what is behind `end` is
    cdef uint8_t kind = ip[6]
    cdef bytes head
    cdef list pieces = []
    if identification is None:
        identification = secrets.randbits(32)
    elif not 0 <= identification < 1 << 32:
        raise ValueError(f"identification {identification} is not of 32 bits")
    # What routers on the way read stays in front: up to the routing header, else the hop-by-hop
    # options (RFC 8200, 4.5).
    while kind in (PROTOCOL_HOP_BY_HOP, PROTOCOL_ROUTING, PROTOCOL_DESTINATION_OPTIONS):
        if at + 8 > total or at + 8 + ip[at + 1] * 8 > total:
            raise ValueError("an IPv6 packet with damaged extension headers")
        size = 8 + ip[at + 1] * 8
        if kind != PROTOCOL_DESTINATION_OPTIONS:
            end, last = at + size, at
        kind = ip[at]
        at += size
    if kind == PROTOCOL_FRAGMENT:
        raise ValueError("an IPv6 fragment: only its sender fragments an IPv6 packet")
    if end + 16 > mtu:
        raise ValueError(f"an IPv6 packet with {end} bytes of headers for routers; MTU {mtu}")
    room = (mtu - end - 8) & ~<uint32_t>7
    at = end
    while at < total:
        size = total - at if end + 8 + total - at <= mtu else room
        head = packet[:4] + struct.pack("!H", end - 40 + 8 + size) + packet[6:end]
        pieces.append(
            head[:last] + bytes([PROTOCOL_FRAGMENT]) + head[last + 1:]
            + struct.pack(
                "!BBHI", ip[last], 0, (at - end) | (at + size < total), identification)
            + packet[at:at + size])
        at += size
    return pieces
