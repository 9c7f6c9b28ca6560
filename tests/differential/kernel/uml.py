"""User-mode Linux: a kernel with IPVS in a process of ours, which works scenarios off.

Its root is this host's file system (hostfs), so that what the guest needs is there already.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

BINARY = "linux.uml"
GUEST = Path(__file__).with_name("guest.py")
BOOT_SECONDS = 60.0
WORK_SECONDS = 240.0

Scenario = Mapping[str, Any]
Result = list[Any]


def is_installed() -> bool:
    return bool(shutil.which(BINARY) and shutil.which("ipvsadm"))


class UserModeLinux:
    """A guest that is up. ``folder`` is for what is exchanged, and for its console's output."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._batches = 0
        self._console = folder / "console"
        to_guest, self._send = os.pipe()
        self._receive, from_guest = os.pipe()
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                [
                    str(shutil.which(BINARY)),
                    "mem=512M",
                    f"uml_dir={folder}",
                    "rootfstype=hostfs",
                    "rootflags=/",
                    "rw",
                    "con=null",
                    "con0=null,fd:1",
                    "ssl=null",
                    f"ssl0=fd:{to_guest},fd:{from_guest}",
                    f"init={sys.executable}",
                    "--",
                    str(GUEST),
                    str(folder),
                ],
                # Its memory is a file there; /dev/shm is small in containers.
                env={"TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=(to_guest, from_guest),
                start_new_session=True,
            )
        os.close(to_guest)
        os.close(from_guest)
        # All of the guest's processes on this host are in the session that began with it. They die
        # when this pipe closes: by `stop`, or because whoever runs the tests was killed.
        self._end = subprocess.Popen(
            ["sh", "-c", f"read -r end; kill -s KILL -- -{self._process.pid}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._hear("ready", BOOT_SECONDS)
        except BaseException:
            self.stop()
            raise

    def run(self, scenarios: Sequence[Scenario]) -> list[Result]:
        """What each scenario comes to: the outcome of each of its steps."""
        self._batches += 1
        name = f"batch{self._batches}"
        (self._folder / f"{name}.json").write_text(json.dumps(scenarios))
        os.write(self._send, f"{name}\n".encode())
        self._hear(name, WORK_SECONDS)
        results = json.loads((self._folder / f"{name}.results").read_text())
        for scenario, result in zip(scenarios, results, strict=True):
            if isinstance(result, str):
                raise RuntimeError(f"{scenario['name']}, in the guest:\n{result}")
        return results

    @property
    def release(self) -> str:
        """Of the kernel."""
        return (self._folder / "release").read_text()

    def _hear(self, word: str, seconds: float) -> None:
        """Wait until the guest says ``word``. RuntimeError with its console if it does not."""
        heard = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._receive, selectors.EVENT_READ)
            while word.encode() not in heard.split():
                part = os.read(self._receive, 4096) if selector.select(seconds) else b""
                if not part:
                    console = self._console.read_text(errors="replace")[-8000:]
                    raise RuntimeError(f"user-mode Linux did not say {word!r}:\n{console}")
                heard += part

    def stop(self) -> None:
        self._end.communicate()
        self._process.wait()
        os.close(self._send)
        os.close(self._receive)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
