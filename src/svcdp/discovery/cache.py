"""What others answered, for as long as it is good."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from dns.rcode import Rcode
from dns.rdatatype import RdataType
from dns.rdtypes.ANY.SOA import SOA
from dns.rrset import RRset

from svcdp.discovery.names import Answer, Key

__all__ = ["Cache", "Question", "lifetime"]

Question = tuple[Key, RdataType]

LIMIT = 4 << 20  #: bytes of responses held; in memory they take some ten times as much
OVERHEAD = 128  # bytes that each response counts for, however short
LONGEST = 3600  # seconds
LONGEST_NEGATIVE = 300
FAILURE = 1  # seconds for which nobody is asked again (RFC 9520, 3.2)


class Cache:
    """Answers by question. Of too many, those go that were not asked for the longest time.

    ``clock`` tells seconds.
    """

    def __init__(self, limit: int = LIMIT, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._size = 0
        # Answer, bytes, and when it was put in and is too old.
        self._held: OrderedDict[Question, tuple[Answer, int, float, float]] = OrderedDict()
        self.hits = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, question: Question) -> Answer | None:
        """What was answered, with the time to live that is left."""
        found = self._held.get(question)
        now = self._clock()
        if found is not None and now >= found[3]:
            self._drop(question)
            found = None
        if found is None:
            return None
        self.hits += 1
        self._held.move_to_end(question)
        answer, _, since, _ = found
        age = int(now - since)
        return replace(
            answer,
            answer=_aged(answer.answer, age),
            authority=_aged(answer.authority, age),
            additional=_aged(answer.additional, age),
        )

    def put(self, question: Question, answer: Answer, size: int) -> None:
        """Keep an answer that came in a response of ``size`` bytes."""
        seconds = lifetime(answer)
        size += OVERHEAD
        if not seconds or size > self._limit:
            return
        self._drop(question)
        now = self._clock()
        self._held[question] = (answer, size, now, now + seconds)
        self._size += size
        while self._size > self._limit:
            self._drop(next(iter(self._held)))

    def _drop(self, question: Question) -> None:
        if (found := self._held.pop(question, None)) is not None:
            self._size -= found[1]


def lifetime(answer: Answer) -> int:
    """For how many seconds an answer is good (RFC 2308, 5, of one that says no)."""
    if answer.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        return FAILURE
    shortest = min((rrset.ttl for rrset in (*answer.answer, *answer.additional)), default=LONGEST)
    if answer.answer and answer.alias is None:
        return min(shortest, LONGEST)
    negative = [
        min(rrset.ttl, record.minimum)
        for rrset in answer.authority
        for record in rrset
        if isinstance(record, SOA)
    ]
    return min([shortest, LONGEST_NEGATIVE, *negative]) if negative else 0


def _aged(rrsets: tuple[RRset, ...], age: int) -> tuple[RRset, ...]:
    found = []
    for rrset in rrsets:
        aged = RRset(rrset.name, rrset.rdclass, rrset.rdtype)
        aged.items = rrset.items
        aged.ttl = max(rrset.ttl - age, 0)
        found.append(aged)
    return tuple(found)
