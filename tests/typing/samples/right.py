"""What a user writes, and what the types say of it."""

from collections.abc import Sequence
from typing import assert_type

import svcdp
from svcdp.abc import Scheduler, Sink
from svcdp.kube import NodeContext, resolve
from svcdp.types import Destination

dp = svcdp.Dataplane(max_connections=1 << 10, seed=1, clock=lambda: 0, timeouts={"udp": 30})
with dp.transaction() as tx:
    web = tx.service("10.96.0.10", 80, scheduler="wrr", persistence=None)
    web.add("10.1.1.7", 8080, weight=2, method="masq")
    web.update("10.1.1.7", 8080, weight=0)

result = dp.process(bytearray(64))
assert_type(result, svcdp.Result)
assert_type(result.verdict, svcdp.Verdict)
assert_type(result.reason, svcdp.Reason)
assert_type(result.packet, memoryview | None)
assert_type(result.next_hop, str | None)
assert_type(result.destination, tuple[str, int] | None)

batch = svcdp.PacketBatch(capacity=8)
assert_type(batch.append(b"packet"), int)
assert_type(dp.process_batch(batch), bytes)
assert_type(dp.process_batch([bytearray(64), memoryview(bytearray(64))], now=1), bytes)
assert_type(batch[0], bytes)
assert_type(batch.verdict(0), svcdp.Verdict)

explanation = dp.explain("tcp 192.0.2.4:40000 -> 10.96.0.10:80")
assert_type(explanation.destinations, tuple[svcdp.PossibleDestination, ...])
assert_type(dp.stats().packets, dict[tuple[svcdp.Verdict, svcdp.Reason], int])
for connection in dp.connections():
    assert_type(connection, svcdp.Connection)

node = NodeContext(name="n1", addresses=["192.0.2.1"], pod_cidrs=["10.0.0.0/16"])
assert_type(resolve([], node), list[svcdp.ServiceSpec])
dp.apply(resolve([], node))


@svcdp.register_scheduler("first")
class First(Scheduler):
    """A scheduler may narrow nothing and widen nothing."""

    def pick(self, flow: svcdp.Flow, destinations: Sequence[Destination]) -> int | None:
        assert_type(destinations[0].active, int)
        return 0


assert_type(First(), First)


def follow(sink: Sink) -> None:
    """A dataplane is a sink."""


follow(dp)
