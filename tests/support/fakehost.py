"""A host that is a few files: sysctls, and tools that write down what they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TOOLS = (
    "ip",
    "ipset",
    "iptables-restore",
    "iptables-save",
    "ip6tables-restore",
    "ip6tables-save",
    "nft",
)

TOOL = """#!/bin/sh
name=${{0##*/}}
echo "$name $*" >> {log}
case $name in *restore|nft) ;; ipset) [ "$2" = restore ];; *) false;; esac && cat >> {log}
[ -f {folder}/$name.fails ] && {{ cat {folder}/$name.fails >&2; exit 2; }}
[ -f {folder}/$name.prints ] && cat {folder}/$name.prints
exit 0
"""


class Host:
    """What :mod:`svcdp.rules` finds and leaves."""

    def __init__(self, folder: Path) -> None:
        self.conf = folder / "conf"
        self.tracked = folder / "nf_conntrack_count"
        self.bin = folder / "bin"
        self.run_dir = str(folder / "run")
        self._log = folder / "log"
        self.bin.mkdir()
        self.sysctls(dict.fromkeys(("all", "default", "lo", "eth0"), "0 0"))

    def sysctls(self, values: Mapping[str, str]) -> None:
        """Set ``accept_local rp_filter`` of interfaces."""
        for interface, value in values.items():
            (self.conf / interface).mkdir(parents=True, exist_ok=True)
            accept_local, rp_filter = value.split()
            (self.conf / interface / "accept_local").write_text(f"{accept_local}\n")
            (self.conf / interface / "rp_filter").write_text(f"{rp_filter}\n")

    def values(self, interface: str = "all") -> str:
        """``accept_local rp_filter`` of an interface."""
        folder = self.conf / interface
        return " ".join((folder / n).read_text().strip() for n in ("accept_local", "rp_filter"))

    def install(self, *tools: str) -> None:
        for tool in tools or TOOLS:
            path = self.bin / tool
            path.write_text(TOOL.format(log=self._log, folder=self.bin))
            path.chmod(0o755)

    def prints(self, tool: str, text: str) -> None:
        (self.bin / f"{tool}.prints").write_text(text)

    def fails(self, tool: str, stderr: str) -> None:
        (self.bin / f"{tool}.fails").write_text(stderr)

    def works(self, tool: str) -> None:
        (self.bin / f"{tool}.fails").unlink()

    def log(self) -> list[str]:
        """What the tools were asked since the last time."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.write_text("")
        return lines
