"""How the kernel reaches an address: asked of its routing tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from svcdp.rules.plan import family_of
from svcdp.rules.tools import decode, run, understanding

__all__ = ["Path", "find_paths"]


@dataclass(frozen=True, slots=True)
class Path:
    """The way to an address.

    ``gateway`` is empty where the address is on the link of ``device``. ``source`` is the
    address of this host that the kernel would send from. ``mtu`` is in bytes: that of the
    device, or less where the kernel knows. ``is_local``: the address is one of this host.
    """

    device: str
    gateway: str
    source: str
    mtu: int
    is_local: bool = False


def find_paths(addresses: Iterable[str]) -> dict[str, Path]:
    """The paths to addresses in this network namespace. Those without a route are missing.
    RulesError where the tool cannot be understood.
    """
    with understanding("ip -json"):
        return _find_paths(sorted(set(addresses)))


def _find_paths(every: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    mtus = None
    for version in (4, 6):
        wanted = [each for each in every if family_of(each) == version]
        if not wanted:
            continue
        if mtus is None:
            mtus = {link["ifname"]: link["mtu"] for link in _ask(["ip", "-json", "link"])}
        # What has no route is an error, and the next is asked for.
        argv = ["ip", f"-{version}", "-json", "-force", "-batch", "-"]
        for route in _ask(argv, "".join(f"route get {each}\n" for each in wanted)):
            found[route["dst"]] = _path(route, mtus)
    return found


def _path(route: dict[str, Any], mtus: dict[str, int]) -> Path:
    via = route.get("gateway") or route.get("via", {}).get("host", "")
    mtu = mtus.get(route["dev"], 0)
    for metric in route.get("metrics", ()):
        mtu = min(mtu, metric.get("mtu", mtu))
    return Path(route["dev"], via, route.get("prefsrc", ""), mtu, route.get("type") == "local")


def _ask(argv: list[str], stdin: str = "") -> Iterator[dict[str, Any]]:
    return decode(run(argv, stdin, check=False))
