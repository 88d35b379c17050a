"""Where processes of a test meet."""

import contextlib
import secrets
import socket


def free_port() -> int:
    """A port of this machine that nobody listens on, and below those that the system hands out: it stays free."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port
