"""``python -m svcdp.cli._demo.server NAME PORT``: HTTP and UDP on one port, IPv4 and IPv6.

Both say who answers and whom they see, as JSON. Prints ``ready`` when it listens.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["main"]


class _Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 1024

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def _answer(name: str, client: str) -> bytes:
    return json.dumps({"server": name, "client": client.removeprefix("::ffff:")}).encode()


def _handler(name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            body = _answer(name, self.client_address[0])
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the clients count."""

    return Handler


def _echo(name: str, sock: socket.socket) -> None:
    while True:
        _, client = sock.recvfrom(65535)
        sock.sendto(_answer(name, client[0]), client)


def main() -> None:
    """Serve until killed."""
    name, port = sys.argv[1], int(sys.argv[2])
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.bind(("::", port))
    threading.Thread(target=_echo, args=(name, udp), daemon=True).start()
    server = _Server(("::", port), _handler(name))
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
