"""The other end of a plain TCP connection: gives back what comes. A process of its own, as a worker is.

`python -m h2o_cli.bench.distributed.echo_run` prints the port it listens on, serves one connection, and ends with it.
"""

from __future__ import annotations

import socket

MOST_BYTES = 2**20


def main() -> None:
    """Serve one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(MOST_BYTES):
                connection.sendall(data)


if __name__ == "__main__":
    main()
