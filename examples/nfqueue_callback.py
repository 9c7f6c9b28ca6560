"""Service routing inside a loop that you have already: the NetfilterQueue package.

    sudo iptables -t raw -A PREROUTING -d 192.0.2.10 -p tcp --dport 80 -j NFQUEUE --queue-num 1
    sudo iptables -t raw -A PREROUTING -s 10.0.0.0/24 -p tcp --sport 8080 -j NFQUEUE --queue-num 1
    sudo python examples/nfqueue_callback.py

The first rule catches what clients send, the second what servers answer.
"""

from __future__ import annotations

from netfilterqueue import NetfilterQueue

import svcdp
from svcdp.io.netfilterqueue import handler

QUEUE = 1


def build() -> svcdp.Dataplane:
    """Two web servers behind 192.0.2.10:80."""
    dp = svcdp.Dataplane()
    with dp.transaction() as tx:
        web = tx.service("192.0.2.10", 80)
        web.add("10.0.0.1", 8080)
        web.add("10.0.0.2", 8080)
    return dp


def main() -> None:
    """Serve until Ctrl-C."""
    queue = NetfilterQueue()
    queue.bind(QUEUE, handler(build()))
    try:
        queue.run()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        queue.unbind()


if __name__ == "__main__":
    main()
