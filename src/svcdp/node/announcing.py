"""Announcing by the settings: which interfaces, and files for BGP speakers."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from svcdp._files import replacing
from svcdp.announce.announcer import Announcer, Holders
from svcdp.announce.bgp import Speaker, render
from svcdp.announce.link import Interface
from svcdp.announce.members import FixedMembers, LeaseMembers, Members
from svcdp.kube.events import Recorder
from svcdp.node.config import NodeConfig
from svcdp.node.network import NetworkWatch
from svcdp.sync import Sync

if TYPE_CHECKING:
    from svcdp.kube.client import Client

__all__ = ["Announcing", "BgpFile", "find_interfaces"]

log = logging.getLogger(__name__)

ETHERNET = 1  # linux/if_arp.h, ARPHRD_ETHER
# linux/if.h; it runs: there is a carrier
IFF_UP, IFF_RUNNING, IFF_NOARP = 0x1, 0x40, 0x80
LOOK = 10.0  # seconds between two tries of what failed
PAUSE = 1.0  # seconds between two looks at interfaces, of which nodes have hundreds
STEP = 0.2  # seconds between two looks at what is to be announced
RELOAD_TIME = 30.0  # seconds
SAID = 500  # bytes of what a program says that are logged


def find_interfaces(names: Collection[str], addresses: Collection[str]) -> list[Interface]:
    """Ethernet devices of this namespace that are up and have a carrier: those whose names match
    one of ``names`` (``eth*``), else those that have one of ``addresses``. Not in an event loop's
    thread.
    """
    from pyroute2 import IPRoute  # type: ignore[import-untyped]  # slow, hence late

    with IPRoute() as netlink:
        links = netlink.get_links()
        holding = {
            entry["index"]
            for entry in netlink.get_addr()
            if (entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")) in addresses
        }
    found = []
    for link in links:
        name, index = link.get_attr("IFLA_IFNAME"), link["index"]
        flags = link["flags"] & (IFF_UP | IFF_RUNNING | IFF_NOARP)
        usable = link["ifi_type"] == ETHERNET and flags == IFF_UP | IFF_RUNNING
        chosen = (
            any(fnmatch.fnmatchcase(name, each) for each in names) if names else (index in holding)
        )
        if usable and chosen:
            mac = bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", ""))
            found.append(Interface(name, index, mac))
    return found


class BgpFile:
    """Keeps a file for a BGP speaker true to what routers may send here, and has it read.

    What fails is logged, once, is in :attr:`problem`, and tried again by the next :meth:`write`.
    """

    def __init__(
        self, file: str, speaker: Speaker, asn: int, reload: Collection[str], holders: Holders
    ) -> None:
        self._file = Path(file)
        self._speaker: Speaker = speaker
        self._asn = asn
        self._reload = tuple(reload)
        self._holders = holders
        self._read: str | None = None  # by the speaker
        self._written: str | None = None
        #: What is wrong now, or "".
        self.problem = ""

    async def write(self, *, withdrawn: bool = False) -> None:
        """The addresses of now; ``withdrawn``: none. Raises nothing."""
        addresses = set() if withdrawn else self._holders.routed_here()
        text = render(self._speaker, addresses, self._asn)
        if text == self._read:
            return
        problem = ""
        try:
            if text != self._written:
                await asyncio.to_thread(self._replace, text)
                self._written = text
                log.info(
                    "prefixes for BGP", extra={"file": str(self._file), "count": len(addresses)}
                )
            await self._have_read()
            self._read = text
        except (OSError, TimeoutError, ValueError) as error:
            problem = f"{self._file}: {str(error) or f'not read within {RELOAD_TIME:g} s'}"
            if problem != self.problem:
                log.error("routers are not told: trying again", extra={"error": problem})
        self.problem = problem

    def _replace(self, text: str) -> None:
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            if self._file.read_text() == text:
                return
        with replacing(self._file) as file:
            file.write(text.encode())
        self._file.chmod(0o644)  # the speaker is another user

    async def _have_read(self) -> None:
        if not self._reload:
            return
        process = await asyncio.create_subprocess_exec(
            *self._reload,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(RELOAD_TIME):
                said, _ = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        if process.returncode:
            words = said[-SAID:].decode(errors="replace").split()
            raise ValueError(f"{self._reload[0]} failed ({process.returncode}): {' '.join(words)}")


class Announcing:
    """All of it, by ``config``. ``client`` has the nodes' Leases; None: there is no cluster.
    ``is_fit``: packets that come here are served.
    """

    def __init__(
        self,
        config: NodeConfig,
        client: Client | None,
        sync: Sync,
        is_fit: Callable[[], bool],
        record: Recorder,
    ) -> None:
        self._config = config
        self._sync = sync
        self._is_fit = is_fit
        self._tasks: list[asyncio.Task[None]] = []
        self.holders = Holders(sync.node)
        sync.subscribe(self.holders.tell)
        self.announcer: Announcer | None = None
        if config.announce == "l2":
            self.announcer = Announcer(self.holders, self._members(client), record)
        self.bgp: BgpFile | None = None
        if config.bgp_file:
            self.bgp = BgpFile(
                config.bgp_file,
                config.bgp_format,
                config.bgp_asn,
                config.bgp_reload,
                self.holders,
            )

    def _members(self, client: Client | None) -> Members:
        config = self._config
        if client is None or config.announce_nodes:
            return FixedMembers(config.announce_nodes or (config.node_name,), self._can_answer)
        return LeaseMembers(
            client,
            config.announce_lease_namespace,
            config.node_name,
            config.announce_lease_duration,
            self._can_answer,
        )

    def _can_answer(self) -> bool:
        """Whether clients on a local network get here, and are served."""
        return self.announcer is not None and bool(self.announcer.interfaces) and self._is_fit()

    def owner(self, address: str) -> str | None:
        """The node that announces it, as far as this one knows; None: not known."""
        return self.announcer.owners.get(address) if self.announcer is not None else None

    def start(self) -> None:
        """As soon as packets are served."""
        work: list[Callable[[], Awaitable[None]]] = []
        if self.announcer is not None:
            announcer = self.announcer
            work += [announcer.members.run, announcer.run, self._look_for_interfaces]
        if self.bgp is not None:
            work.append(self._write)
        self._tasks += [asyncio.create_task(_keep_on(each)) for each in work]

    async def close(self) -> None:
        """Nothing is announced afterwards."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        is_started, self._tasks = bool(self._tasks), []
        if self.announcer is not None:
            self.announcer.close()
            if is_started:
                await self.announcer.members.leave()
        if self.bgp is not None:
            await self.bgp.write(withdrawn=True)

    async def _look_for_interfaces(self) -> None:
        assert self.announcer is not None
        known: Collection[str] | None = None
        last, changed = float("-inf"), False
        with NetworkWatch(links=True) as watch:
            while True:
                addresses = tuple(self._sync.node.addresses)
                changed |= watch.take() or addresses != known
                if time.monotonic() >= last + (PAUSE if changed else LOOK):
                    known, last, changed = addresses, time.monotonic(), False
                    names = self._config.announce_interfaces
                    self.announcer.use(await asyncio.to_thread(find_interfaces, names, addresses))
                await asyncio.sleep(STEP)

    async def _write(self) -> None:
        assert self.bgp is not None
        seen: tuple[int, bool] | None = None
        at = 0.0
        while True:
            now = (self.holders.generation, self._is_fit())
            if now != seen or (self.bgp.problem and time.monotonic() >= at):
                seen, at = now, time.monotonic() + LOOK
                await self.bgp.write(withdrawn=not now[1])
            await asyncio.sleep(STEP)


async def _keep_on(work: Callable[[], Awaitable[None]]) -> None:
    """Again, if something unforeseen ends it."""
    while True:
        try:
            return await work()
        except Exception:  # of netlink, or a bug: the next time may do
            log.exception("announcing fails: trying again")
            await asyncio.sleep(LOOK)
