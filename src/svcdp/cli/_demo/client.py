"""``python -m svcdp.cli._demo.client``: asks servers, and counts who answered.

The first line of stdin is the job, as JSON; a line of JSON on stdout is the result.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

__all__ = ["main"]

TIMEOUT = 5.0  # seconds; enough for a lost SYN to be sent again, twice
PAUSE = 0.02  # seconds between two requests on a connection that stays


def ask_http(address: str, port: int) -> dict[str, Any]:
    """One request over a connection of its own; who served, and whom it saw."""
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT)
    try:
        return ask_again(connection)
    finally:
        connection.close()


def ask_again(connection: http.client.HTTPConnection) -> dict[str, Any]:
    """One request over a connection that stays."""
    connection.request("GET", "/")
    answer = json.loads(connection.getresponse().read())
    return {"server": answer["server"], "client": answer["client"][0]}


def ask_udp(address: str, port: int) -> dict[str, Any]:
    """One datagram from a socket of its own, and its echo."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((address, port))
        sock.send(b"hello")
        return {"server": sock.recv(65535).decode().partition(" ")[0]}


def requests(job: dict[str, Any]) -> dict[str, Any]:
    """``count`` requests to ``address``, one after the other."""
    ask = ask_udp if job["protocol"] == "UDP" else ask_http
    served: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for _ in range(job["count"]):
        try:
            answer = ask(job["address"], job["port"])
        except (OSError, http.client.HTTPException) as error:
            errors[str(error)] += 1
        else:
            served[answer["server"]] += 1
            seen[answer.get("client", "")] += 1
    return {"served": served, "seen": seen, "failed": errors.total(), "errors": errors}


class Load:
    """Requests without pause over new connections, and others over connections that stay.

    A request counts for the phase in which it began. A connection that stays is *lost* when
    a request on it fails, and *moved* when another server than before answers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._served: list[Counter[str]] = [Counter()]
        self._errors: Counter[str] = Counter()
        self._kept = Counter(connections=0, requests=0, lost=0, moved=0)

    def fresh(self, address: str, port: int) -> None:
        """Ask over new connections."""
        while not self._stop.is_set():
            served = self._served[-1]
            try:
                name = ask_http(address, port)["server"]
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self._errors[str(error)] += 1
            else:
                with self._lock:
                    served[name] += 1

    def kept(self, address: str, port: int) -> None:
        """Ask over one connection."""
        connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT)
        connection.auto_open = 0  # it is not opened again: lost is lost
        with self._lock:
            self._kept["connections"] += 1
        try:
            connection.connect()
            first = ask_again(connection)["server"]
            while not self._stop.wait(PAUSE):
                name = ask_again(connection)["server"]
                with self._lock:
                    self._kept["requests"] += 1
                    self._kept["moved"] += name != first
        except (OSError, http.client.HTTPException) as error:
            with self._lock:
                self._kept["lost"] += 1
                self._errors[f"lost: {error}"] += 1
        finally:
            connection.close()

    def run(self, targets: list[tuple[str, int]], kept: int) -> dict[str, Any]:
        """Until stdin ends. Each line of it begins a new phase, confirmed by a line."""
        calls: list[tuple[Callable[[str, int], None], str, int]] = []
        for address, port in targets:
            calls += [(self.fresh, address, port)] + [(self.kept, address, port)] * kept
        threads = [threading.Thread(target=call, args=(a, p)) for call, a, p in calls]
        for thread in threads:
            thread.start()
        print("begun", flush=True)
        for _ in sys.stdin:
            self._served.append(Counter())
            print("begun", flush=True)
        self._stop.set()
        for thread in threads:
            thread.join()
        failed = self._errors.total() - self._kept["lost"]
        return {
            "phases": self._served,
            "failed": failed,
            "errors": self._errors,
            "kept": self._kept,
        }


def main() -> None:
    """Do the job."""
    job = json.loads(sys.stdin.readline())
    result: Any
    if "targets" in job:
        result = Load().run(job["targets"], job["kept"])
    else:
        result = [requests(each) for each in job["requests"]]
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
