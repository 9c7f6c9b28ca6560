"""One answer out of the cluster's names, the cache and the upstreams."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace

import dns.rrset
from dns.name import Name
from dns.rcode import Rcode
from dns.rdatatype import RdataType
from dns.rdtypes.ANY.CNAME import CNAME
from dns.rrset import RRset

from svcdp.discovery.cache import Cache, Question
from svcdp.discovery.names import Answer, Key, Names, key_of
from svcdp.discovery.upstream import Forwarder, Upstream

__all__ = ["Resolver"]

log = logging.getLogger(__name__)

ANY_TTL = 3600  # seconds
ALIASES = 8  # names that may be passed on the way to an answer
PROBE_INTERVAL = 60.0  # seconds until an upstream that asked us is tried again


class Resolver:
    """Knows the cluster's names, and asks ``forwarder`` for all others.

    Who asks for the same at the same time waits for the same answer, so each question that comes
    back to us by way of the upstreams ends here.
    """

    def __init__(self, names: Names, forwarder: Forwarder, cache: Cache | None = None) -> None:
        self.names = names
        self.forwarder = forwarder
        self.cache = Cache() if cache is None else cache
        self._asking: dict[Question, asyncio.Task[Answer]] = {}
        self._probes: dict[Key, Upstream] = {}

    def look(
        self,
        name: Name,
        rdtype: RdataType,
        *,
        recurse: bool = True,
        fetched: Mapping[Question, Answer] | None = None,
    ) -> Answer | Name:
        """The answer, or the name for which somebody must be asked first. ``fetched`` are answers
        of upstreams, besides those that the cache has.

        Without ``recurse`` only what the cluster itself knows.
        """
        passed: list[RRset] = []
        is_own = True  # nothing of it is what others say
        for _ in range(ALIASES):
            key = key_of(name)
            if key in self._probes:
                self._avoid(self._probes[key])
                return Answer(Rcode.REFUSED)
            found = self.names.lookup(name, rdtype)
            if found is None:
                if not recurse:
                    return Answer(answer=tuple(passed)) if passed else Answer(Rcode.REFUSED)
                if rdtype == RdataType.ANY:
                    return Answer(answer=(_nothing_more(name),))
                question = key, rdtype
                found = (fetched or {}).get(question) or self.cache.get(question)
                if found is None:
                    return name
                found, target = self._back(found, name)
                is_own = False
            else:
                target = found.alias
            passed += found.answer
            if target is None or rdtype in (RdataType.CNAME, RdataType.ANY):
                return replace(found, answer=tuple(passed), is_own=is_own)
            name = target
        return Answer(Rcode.SERVFAIL)

    async def resolve(self, name: Name, rdtype: RdataType) -> Answer:
        """The answer, from wherever it is."""
        fetched: dict[Question, Answer] = {}
        while not isinstance(found := self.look(name, rdtype, fetched=fetched), Answer):
            question = key_of(found), rdtype
            fetched[question] = await self._ask(found, question)
        return found

    async def close(self) -> None:
        """Wait for nobody any more."""
        tasks = [*self._asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def watch(self) -> None:
        """Find upstreams that ask us, for ever. They are not asked until they have ceased to."""
        suspects = self.forwarder.upstreams
        while suspects:
            looping = [each for each in suspects if await self._is_loop(each)]
            await asyncio.sleep(PROBE_INTERVAL)
            suspects = tuple(looping)

    async def _is_loop(self, upstream: Upstream) -> bool:
        """Ask for a name of our own zone that nobody can guess, and see whether it comes here."""
        name = Name((secrets.token_hex(8).encode(), *self.names.zone.labels))
        self._probes[key_of(name)] = upstream
        self.forwarder.avoid(upstream, yes=False)
        try:
            await self.forwarder.ask_one(upstream, name, RdataType.A)
        finally:
            del self._probes[key_of(name)]
        return self.forwarder.is_avoided(upstream)

    def _avoid(self, upstream: Upstream) -> None:
        if not self.forwarder.is_avoided(upstream):
            log.error("this upstream asks us: it is not asked", extra={"upstream": str(upstream)})
        self.forwarder.avoid(upstream, yes=True)

    async def _ask(self, name: Name, question: Question) -> Answer:
        task = self._asking.get(question)
        if task is None:
            task = asyncio.create_task(self._fetch(name, question))
            self._asking[question] = task
            task.add_done_callback(lambda _: self._asking.pop(question))
        return await asyncio.shield(task)  # others may wait for it, too

    async def _fetch(self, name: Name, question: Question) -> Answer:
        answer, size = await self.forwarder.ask(name, question[1])
        self.cache.put(question, answer, size)
        return answer

    def _back(self, found: Answer, name: Name) -> tuple[Answer, Name | None]:
        """An upstream's answer up to where it leads into the cluster, and the name there. None: it
        does not; then the upstream has followed its aliases.
        """
        aliases = {
            rrset.name: (rrset, record.target)
            for rrset in found.answer
            for record in rrset
            if isinstance(record, CNAME)
        }
        passed: list[RRset] = []
        while name in aliases and len(passed) < ALIASES:
            rrset, name = aliases[name]
            passed.append(rrset)
            if self.names.contains(key_of(name)):
                return Answer(answer=tuple(passed)), name
        return found, None


def _nothing_more(name: Name) -> RRset:
    """To who asks for anything of a name that others have: they would send much, and to whom
    somebody else pretends to be (RFC 8482, 4.2).
    """
    return dns.rrset.from_text(name, ANY_TTL, "IN", "HINFO", '"RFC8482" ""')
