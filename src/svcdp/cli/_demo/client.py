"""``python -m svcdp.cli._demo.client``: asks servers, and counts who answered.

Takes one JSON job on stdin, ``{"mode": "requests"|"load", ...}``, and prints one JSON result.
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

TIMEOUT = 5.0  # seconds; longer than a lost SYN needs to be sent again


def ask_http(address: str, port: int) -> str:
    """One request over a connection of its own; the name of the server."""
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT)
    try:
        return ask_again(connection)
    finally:
        connection.close()


def ask_again(connection: http.client.HTTPConnection) -> str:
    """One request over a connection that stays."""
    connection.request("GET", "/")
    return str(json.loads(connection.getresponse().read())["server"])


def ask_udp(address: str, port: int) -> str:
    """One datagram from a socket of its own, and its echo."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((address, port))
        sock.send(b"hello")
        return str(json.loads(sock.recv(65535))["server"])


def requests(job: dict[str, Any]) -> dict[str, Any]:
    """``count`` requests one after the other."""
    ask = ask_udp if job["protocol"] == "udp" else ask_http
    served: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for _ in range(job["count"]):
        try:
            served[ask(job["address"], job["port"])] += 1
        except OSError as error:
            errors[str(error)] += 1
    return {"served": served, "failed": errors.total(), "errors": errors}


def load(job: dict[str, Any]) -> dict[str, Any]:
    """New connections without pause, and others that stay, until stdin ends.

    A connection that stays is *lost* when a request on it fails, *moved* when another
    server than before answers.
    """
    stop = threading.Event()
    lock = threading.Lock()
    served: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    counts = Counter(lost=0, moved=0, kept_requests=0)

    def fresh() -> None:
        while not stop.is_set():
            try:
                name = ask_http(job["address"], job["port"])
            except (OSError, http.client.HTTPException) as error:
                with lock:
                    errors[str(error)] += 1
            else:
                with lock:
                    served[name] += 1

    def kept() -> None:
        connection = http.client.HTTPConnection(job["address"], job["port"], timeout=TIMEOUT)
        connection.auto_open = 0  # a lost connection is lost
        try:
            connection.connect()
            first = ask_again(connection)
            while not stop.wait(0.02):
                name = ask_again(connection)
                with lock:
                    counts["kept_requests"] += 1
                    counts["moved"] += name != first
        except (OSError, http.client.HTTPException) as error:
            with lock:
                counts["lost"] += 1
                errors[f"kept connection: {error}"] += 1
        finally:
            connection.close()

    targets: list[Callable[[], None]] = [fresh] * job["fresh"] + [kept] * job["kept"]
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    failed = errors.total() - counts["lost"]
    return {"served": served, "failed": failed, "errors": errors, "kept": job["kept"], **counts}


def main() -> None:
    """Do the job of the first line of stdin."""
    job = json.loads(sys.stdin.readline())
    result = load(job) if job["mode"] == "load" else requests(job)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
