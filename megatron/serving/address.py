"""Where the server listens, and the keys that this needs."""

import ipaddress
import os
import socket

from megatron.config.schema.serving_keys import ServingKeys
from megatron.errors import UserError

KEYS_VARIABLE = "DEEPY_API_KEYS"


def api_keys(keys: ServingKeys) -> list[str]:
    """The keys of clients. Raises UserError where there are none, but other machines reach the address."""
    found = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if not found and not all(ipaddress.ip_address(address[0]).is_loopback for _, address in _addresses(keys)):
        raise UserError(
            f"serve_host ({keys.serve_host}) lets other machines in, which needs keys: set the environment variable "
            f"{KEYS_VARIABLE} to one or more, separated by commas, or use serve_host 127.0.0.1"
        )
    return found


def listen(keys: ServingKeys) -> socket.socket:
    """A listening socket. Raises UserError where it cannot be had."""
    family, address = _addresses(keys)[0]
    try:
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"serve_host ({keys.serve_host}) with serve_port ({keys.serve_port}) cannot be listened on: "
            f"{error.strerror}; another serve_port, or 0 for a free one, may work"
        ) from error


def shown(listener: socket.socket) -> str:
    """The address as a client writes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _addresses(keys: ServingKeys) -> list[tuple[int, tuple[str, int]]]:
    """The family and address of each meaning of serve_host."""
    try:
        found = socket.getaddrinfo(keys.serve_host or None, keys.serve_port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"serve_host ({keys.serve_host}) is not an address of this machine: {error}") from error
    return [(family, (str(address[0]), int(address[1]))) for family, _, _, _, address in found]
