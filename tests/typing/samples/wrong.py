"""Mistakes that a type checker must find; the comments name each as mypy does."""

from collections.abc import Sequence

import svcdp
from svcdp.abc import Scheduler, Sink
from svcdp.kube import NodeContext
from svcdp.types import Destination

dp = svcdp.Dataplane(max_connections="many")  # E: arg-type
dp.process("text")  # E: arg-type
dp.process(bytearray(64), now="later")  # E: arg-type
dp.process_batch(bytearray(64)[0])  # E: arg-type
dp.process(bytearray(64)).verdict = svcdp.Verdict.DROP  # E: misc
dp.process(bytearray(64)).packet[0]  # E: index
dp.apply([("10.96.0.10", 80, "tcp")])  # E: list-item
dp.explain(b"tcp")  # E: arg-type

with dp.transaction() as tx:
    tx.service("10.96.0.10", "http")  # E: arg-type
    tx.service("10.96.0.10", 80).update("10.1.1.7", 8080, 0)  # E: call-arg

svcdp.PacketBatch("64")  # E: arg-type
svcdp.ServiceSpec("10.96.0.10", 80).port = 81  # E: misc
svcdp.SourceRule(on_empty="ignore")  # E: arg-type
NodeContext(addresses=1)  # E: arg-type
svcdp.register_scheduler("class")(str)  # E: type-var


class Second(Scheduler):
    """An index is a number."""

    def pick(self, flow: svcdp.Flow, destinations: Sequence[Destination]) -> str:  # E: override
        return destinations[1].address


def follow(sink: Sink) -> None:
    """A context is no sink."""


follow(NodeContext())  # E: arg-type
