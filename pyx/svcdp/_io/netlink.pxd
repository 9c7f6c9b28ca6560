# The kernel interfaces of a queue: nfnetlink_queue over netlink, from its UAPI headers.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

cdef extern from "<sys/types.h>" nogil:
    ctypedef int socklen_t

cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        pass

    struct iovec:
        void *iov_base
        size_t iov_len

    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags

    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    int socket(int domain, int type, int protocol)
    int bind(int fd, const sockaddr *address, socklen_t length)
    int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *length)
    ssize_t send(int fd, const void *buffer, size_t length, int flags)
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    ssize_t sendto(
        int fd, const void *buffer, size_t length, int flags, const sockaddr *to, socklen_t size)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int recvmmsg(int fd, mmsghdr *messages, unsigned int count, int flags, void *timeout)
    int AF_INET, AF_INET6, AF_NETLINK, SOCK_RAW, SOCK_CLOEXEC, SOL_SOCKET, IPPROTO_RAW
    int SO_RCVBUF, SO_RCVBUFFORCE, SO_SNDBUF, SO_SNDBUFFORCE, SO_MARK, MSG_DONTWAIT, MSG_TRUNC

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr

    struct sockaddr_in:
        uint16_t sin_family
        in_addr sin_addr

    struct in6_addr:
        pass

    struct sockaddr_in6:
        uint16_t sin6_family
        in6_addr sin6_addr

cdef extern from "<linux/netlink.h>" nogil:
    struct sockaddr_nl:
        uint16_t nl_family

    struct nlmsghdr:
        uint32_t nlmsg_len
        uint16_t nlmsg_type
        uint16_t nlmsg_flags
        uint32_t nlmsg_seq
        uint32_t nlmsg_pid

    struct nlattr:
        uint16_t nla_len
        uint16_t nla_type

    int NETLINK_NETFILTER, NETLINK_NO_ENOBUFS, SOL_NETLINK, NLM_F_REQUEST, NLM_F_ACK
    int NLA_TYPE_MASK

cdef extern from "<linux/netfilter.h>" nogil:
    int NF_DROP, NF_ACCEPT, NF_REPEAT

cdef extern from "<linux/netfilter/nfnetlink.h>" nogil:
    struct nfgenmsg:
        uint8_t nfgen_family
        uint8_t version
        uint16_t res_id

    int NFNL_SUBSYS_QUEUE, NFNETLINK_V0

cdef extern from "<linux/netfilter/nfnetlink_queue.h>" nogil:
    int NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT, NFQNL_MSG_CONFIG
    int NFQNL_CFG_CMD_BIND, NFQNL_COPY_PACKET
    int NFQA_PACKET_HDR, NFQA_VERDICT_HDR, NFQA_MARK, NFQA_PAYLOAD, NFQA_CAP_LEN, NFQA_SKB_INFO
    int NFQA_CFG_CMD, NFQA_CFG_PARAMS, NFQA_CFG_QUEUE_MAXLEN, NFQA_CFG_MASK, NFQA_CFG_FLAGS
    int NFQA_CFG_F_FAIL_OPEN, NFQA_CFG_F_GSO, NFQA_SKB_CSUMNOTREADY

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents

    int poll(pollfd *fds, unsigned long count, int timeout)
    short POLLIN

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t read(int fd, void *buffer, size_t length)
    ssize_t write(int fd, const void *buffer, size_t length)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

    int clock_gettime(int clock, timespec *now)
    int CLOCK_MONOTONIC
