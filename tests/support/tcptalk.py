"""Real TCP connections between two addresses: `python -m support.tcptalk serve PORT` and `... connect HOST PORT`.

Each client sends its number and some bytes, reads them back, and closes; `--resets` of them end by RST instead (linger
of 0). The client side prints how many connections it made.
"""

from __future__ import annotations

import argparse
import socket
import socketserver
import struct
import threading


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        connection: socket.socket = self.request
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except ConnectionResetError:
            pass


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512


def talk(host: str, port: int, number: int, octets: int, reset: bool) -> None:
    with socket.create_connection((host, port), timeout=20) as connection:
        said = struct.pack("!I", number) * (octets // 4)
        connection.sendall(said)
        left = len(said)
        while left:
            left -= len(connection.recv(65536))
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tcptalk")
    parser.add_argument("what", choices=("serve", "connect"))
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--resets", type=int, default=0)
    parser.add_argument("--octets", type=int, default=4000)
    parser.add_argument("--at-once", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.what == "serve":
        with Server((arguments.host, arguments.port), Echo) as server:
            server.serve_forever()
    gate = threading.Semaphore(arguments.at_once)

    def one(number: int) -> None:
        with gate:
            talk(arguments.host, arguments.port, number, arguments.octets, number < arguments.resets)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(arguments.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(len(threads))


if __name__ == "__main__":
    main()
