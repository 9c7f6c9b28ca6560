# What an FTP control connection says about data connections (RFC 959, RFC 2428), and how to make
# it say something else. Only NAT needs this: elsewhere both ends see the same addresses.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memcpy, memmove, memset

from svcdp._core.abi cimport *
from svcdp._core.atomic cimport unlikely
from svcdp._core.checksum cimport apply_delta, delta_add, transport_checksum
from svcdp._core.memory cimport (
    copy_address, htons, load16, load32, ntohl, ntohs, same_address, store16,
)
from svcdp._core.packet cimport View
from svcdp._core.sequence cimport SeqDelta, note_change
from svcdp._core.xmit cimport destination_offset, source_offset

cdef extern from "<arpa/inet.h>" nogil:
    int inet_pton(int family, const char *text, void *address)
    const char *inet_ntop(int family, const void *address, char *text, unsigned size)
    int AF_INET, AF_INET6

cdef enum:
    FTP_NOTHING = 0
    FTP_PASV = 1               # the client asks for an address and port to connect to,
    FTP_EPSV = 2               # or for a port
    FTP_PORT = 3               # the client names where it listens
    FTP_EPRT = 4
    FTP_PASV_REPLY = 5         # the server names where it listens
    FTP_EPSV_REPLY = 6

    ADDRESS_TEXT_MAX = 46      # INET6_ADDRSTRLEN
    FTP_TEXT_MAX = 64          # |2|address|port|
    IP_LENGTH_MAX = 65535

    # ftp_rewrite()
    FTP_WRITTEN = 0
    FTP_NO_HEADROOM = 1        # before the packet, for longer text
    FTP_WRONG_CHECKSUM = 2     # its receiver will drop the packet; nothing was changed

# What a helper knows of a control connection.
cdef struct FtpControl:
    SeqDelta seq[2]            # by direction
    uint8_t asked              # FTP_PASV, FTP_EPSV: the client waits for the reply

cdef struct FtpMessage:
    uint8_t kind
    uint8_t words              # of the address, 0: there is none
    uint8_t delimiter          # of EPRT and the reply to EPSV
    uint16_t port              # wire order
    uint8_t address[16]
    uint32_t start             # offsets in the payload of the text to be replaced
    uint32_t end


cdef inline bint is_digit(uint8_t c) noexcept nogil:
    return b"0" <= c <= b"9"


cdef inline uint32_t read_number(
    const uint8_t *text, uint32_t at, uint32_t length, uint32_t limit, uint32_t *number
) noexcept nogil:
    """Behind the decimal number at `at`, which is at most `limit` and does not end the text (then
    it may be cut short); else 0.
    """
    cdef uint32_t value = 0
    cdef uint32_t begin = at
    while at < length and is_digit(text[at]):
        value = value * 10 + (text[at] - <uint8_t>b"0")
        at += 1
        if value > limit:
            return 0
    number[0] = value
    return at if begin < at < length else 0


cdef inline bint read_host_port(
    const uint8_t *text, uint32_t at, uint32_t length, FtpMessage *message
) noexcept nogil:
    """h1,h2,h3,h4,p1,p2"""
    cdef uint8_t bytes[6]
    cdef uint32_t number = 0
    cdef uint32_t i
    message.start = at
    for i in range(6):
        if i:
            if text[at] != b",":
                return False
            at += 1
        at = read_number(text, at, length, 255, &number)
        if at == 0:
            return False
        bytes[i] = <uint8_t>number
    message.end = at
    message.words = 1
    memcpy(message.address, bytes, 4)
    memcpy(&message.port, bytes + 4, 2)
    return message.port != 0


cdef inline bint read_port(
    const uint8_t *text, uint32_t at, uint32_t length, FtpMessage *message
) noexcept nogil:
    """port|"""
    cdef uint32_t number = 0
    at = read_number(text, at, length, 65535, &number)
    if at == 0 or number == 0 or text[at] != message.delimiter:
        return False
    message.port = htons(<uint16_t>number)
    message.end = at + 1
    return True


cdef inline bint read_delimiter(
    const uint8_t *text, uint32_t at, uint32_t length, FtpMessage *message
) noexcept nogil:
    """RFC 2428, 2: any printable character; digits would make the rest ambiguous."""
    message.start = at
    message.delimiter = text[at] if at < length else 0
    return 33 <= message.delimiter <= 126 and not is_digit(message.delimiter)


cdef inline bint read_extended(
    const uint8_t *text, uint32_t at, uint32_t length, FtpMessage *message
) noexcept nogil:
    """|family|address|port|"""
    cdef char address[ADDRESS_TEXT_MAX]
    cdef uint32_t size = 0
    if not read_delimiter(text, at, length, message) or length - at < 4:
        return False
    if text[at + 2] != message.delimiter:
        return False
    message.words = 1 if text[at + 1] == b"1" else 4 if text[at + 1] == b"2" else 0
    at += 3
    # A NUL would end the address for inet_pton().
    while (
        at < length and text[at] != message.delimiter and text[at]
        and size < ADDRESS_TEXT_MAX - 1
    ):
        address[size] = <char>text[at]
        size += 1
        at += 1
    address[size] = 0
    if at == length or text[at] != message.delimiter or message.words == 0:
        return False
    if inet_pton(AF_INET if message.words == 1 else AF_INET6, address, message.address) != 1:
        return False
    return read_port(text, at + 1, length, message)


cdef inline bint has_word(
    const uint8_t *text, uint32_t at, uint32_t length, const char *word
) noexcept nogil:
    """Whether this word of 4 letters, in upper case here, is there, and something behind it."""
    cdef uint32_t i
    cdef uint8_t c
    if length - at < 5:
        return False
    for i in range(4):
        c = text[at + i]
        if b"a" <= c <= b"z":
            c -= 32
        if c != <uint8_t>word[i]:
            return False
    return True


cdef inline bint ends_command(const uint8_t *text, uint32_t at) noexcept nogil:
    return text[at] == b"\r" or text[at] == b"\n"


cdef inline uint8_t read_command(
    const uint8_t *text, uint32_t at, uint32_t length, FtpMessage *message
) noexcept nogil:
    """What the line of the client at `at` says."""
    if has_word(text, at, length, b"PASV") and ends_command(text, at + 4):
        return FTP_PASV
    if has_word(text, at, length, b"EPSV"):
        # With the family of the address; "EPSV ALL" asks for nothing yet.
        if ends_command(text, at + 4) or (
            length - at > 5 and text[at + 4] == b" " and is_digit(text[at + 5])
        ):
            return FTP_EPSV
    if has_word(text, at, length, b"PORT") and text[at + 4] == b" ":
        return FTP_PORT if read_host_port(text, at + 5, length, message) else FTP_NOTHING
    if has_word(text, at, length, b"EPRT") and text[at + 4] == b" ":
        return FTP_EPRT if read_extended(text, at + 5, length, message) else FTP_NOTHING
    return FTP_NOTHING


cdef inline uint8_t read_reply(
    const uint8_t *text, uint32_t at, uint32_t length, uint8_t asked, FtpMessage *message
) noexcept nogil:
    """What the line of the server at `at` says to a client who `asked`."""
    if asked == FTP_PASV and has_word(text, at, length, b"227 "):
        # RFC 1123, 4.1.2.6: the numbers are wherever the first digit is.
        at += 4
        while at < length and not is_digit(text[at]) and not ends_command(text, at):
            at += 1
        return FTP_PASV_REPLY if read_host_port(text, at, length, message) else FTP_NOTHING
    if asked == FTP_EPSV and has_word(text, at, length, b"229 "):
        at += 4
        while at < length and text[at] != b"(" and not ends_command(text, at):
            at += 1
        if at == length or text[at] != b"(":
            return FTP_NOTHING
        at += 1
        if (
            read_delimiter(text, at, length, message) and length - at > 3
            and text[at + 1] == message.delimiter and text[at + 2] == message.delimiter
            and read_port(text, at + 3, length, message)
        ):
            return FTP_EPSV_REPLY
    return FTP_NOTHING


cdef inline uint8_t ftp_read(
    const uint8_t *text, uint32_t length, bint from_client, uint8_t asked, FtpMessage *message
) noexcept nogil:
    """The first of a payload's lines that says something about a data connection. A line that
    begins in an earlier segment is not understood, as in ip_vs_ftp.c.
    """
    cdef uint32_t at = 0
    memset(message, 0, sizeof(FtpMessage))
    while at < length:
        if from_client:
            message.kind = read_command(text, at, length, message)
        else:
            message.kind = read_reply(text, at, length, asked, message)
        if message.kind != FTP_NOTHING:
            break
        while at < length and text[at] != b"\n":
            at += 1
        at += 1
    return message.kind


cdef inline uint32_t ftp_payload(const svcdp_packet *packet, const View *view) noexcept nogil:
    """Offset in the packet of the TCP payload; view.end: there is none."""
    cdef uint32_t header = (packet.data[view.transport + 12] >> 4) * 4
    return min(view.transport + header, view.end)


cdef inline uint8_t ftp_look(
    const svcdp_packet *packet, const View *view, bint from_client, FtpControl *control,
    FtpMessage *message
) noexcept nogil:
    """What the packet says about a data connection, and note what the client asks for.

    FTP_PORT, FTP_EPRT: the server is about to connect to message.port of the client, who can name
    no one else. FTP_PASV_REPLY, FTP_EPSV_REPLY: the client is, to message.port of the server.
    """
    cdef uint32_t at = ftp_payload(packet, view)
    cdef uint8_t kind = ftp_read(
        packet.data + at, view.end - at, from_client, control.asked, message)
    if from_client and message.words and not (
        message.words == view.words
        and same_address(message.address, view.source, view.words)
    ):
        message.kind = kind = FTP_NOTHING
    if kind != FTP_NOTHING:
        control.asked = kind if kind == FTP_PASV or kind == FTP_EPSV else FTP_NOTHING
    return kind


cdef inline uint32_t ftp_format(
    const FtpMessage *message, const uint8_t *address, uint32_t words, uint16_t port, char *text
) noexcept nogil:
    """The text (of so many bytes, at most FTP_TEXT_MAX - 1) that names another address and port in
    the way of this message.
    """
    cdef char readable[ADDRESS_TEXT_MAX]
    cdef int d = message.delimiter
    cdef int family = b"1" if words == 1 else b"2"
    cdef unsigned number = ntohs(port)
    if message.kind == FTP_EPSV_REPLY:
        return <uint32_t>snprintf(text, FTP_TEXT_MAX, b"%c%c%c%u%c", d, d, d, number, d)
    if message.kind == FTP_EPRT:
        inet_ntop(AF_INET if words == 1 else AF_INET6, address, readable, sizeof(readable))
        return <uint32_t>snprintf(
            text, FTP_TEXT_MAX, b"%c%c%c%s%c%u%c", d, family, d, readable, d, number, d)
    return <uint32_t>snprintf(
        text, FTP_TEXT_MAX, b"%u,%u,%u,%u,%u,%u", address[0], address[1], address[2], address[3],
        number >> 8, number & 255)


cdef inline bint has_right_checksum(
    const svcdp_packet *packet, const View *view
) noexcept nogil:
    return packet.flags & SVCDP_PACKET_CSUM_PARTIAL or transport_checksum(
        packet.data + source_offset(view.words), packet.data + destination_offset(view.words),
        view.words, view.protocol, packet.data + view.transport, view.end - view.transport) == 0


cdef inline void resize(
    svcdp_packet *packet, View *view, uint32_t before, int32_t difference
) noexcept nogil:
    """Make the packet longer by `difference`: its first `before` bytes move into the headroom."""
    cdef uint8_t *data = packet.data - difference
    cdef uint8_t *length = data + 2
    cdef uint16_t was
    memmove(data, packet.data, before)
    packet.data = data
    packet.len += <uint32_t>difference
    packet.headroom = <uint16_t>(packet.headroom - difference)
    view.end += <uint32_t>difference
    view.source = data + source_offset(view.words)
    view.destination = data + destination_offset(view.words)
    if view.words == 1:
        was = load16(length)
        store16(length, htons(<uint16_t>view.end))
        store16(data + 10, apply_delta(load16(data + 10), delta_add(0, was, load16(length))))
    else:
        store16(data + 4, htons(<uint16_t>(view.end - 40)))


cdef inline uint32_t ftp_rewrite(
    svcdp_packet *packet, View *view, SeqDelta *seq, const FtpMessage *message,
    const uint8_t *address, uint16_t port
) noexcept nogil:
    """Have the message name this address (of view.words) and port (wire order) instead. `seq` is of
    the packet's direction.

    To be called before move_numbers() and translate(): the latter completes the checksum.
    """
    cdef char text[FTP_TEXT_MAX]
    cdef uint32_t size = ftp_format(message, address, view.words, port, text)
    cdef uint32_t payload = ftp_payload(packet, view)
    cdef uint32_t start = payload + message.start
    cdef uint32_t end = payload + message.end
    cdef int32_t difference = <int32_t>(size - (message.end - message.start))
    if unlikely(end > view.end):
        return FTP_WRONG_CHECKSUM      # the caller's buffer changed under our hands
    if difference == 0 and memcmp(packet.data + start, text, size) == 0:
        return FTP_WRITTEN
    if not has_right_checksum(packet, view):
        return FTP_WRONG_CHECKSUM
    if difference > packet.headroom or view.end + difference > IP_LENGTH_MAX:
        return FTP_NO_HEADROOM
    if difference:
        resize(packet, view, start, difference)
        note_change(seq, ntohl(load32(packet.data + view.transport + 4)), difference)
    memcpy(packet.data + start, text, size)
    packet.flags |= SVCDP_PACKET_CSUM_PARTIAL | SVCDP_PACKET_CHANGED
    return FTP_WRITTEN
