"""Which network interface leads to the other nodes.

gloo takes the one that the machine's own name stands for, which is often the loopback: ranks of other nodes then wait
for ever. Standard library only.
"""

import fcntl
import socket
import struct
from contextlib import suppress

SIOCGIFADDR = 0x8915


def interface_towards(address: str) -> str | None:
    """The interface that has the address by which this machine reaches `address`; None where it cannot be told.

    address: name or number of the node where the ranks meet, which may be this one.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        target = socket.gethostbyname(address)
        probe.connect((target, 9))  # sends nothing: it only asks for the route
        own = probe.getsockname()[0]
        return next((name for _, name in socket.if_nameindex() if _address(name) == own), None)
    return None


def free_port() -> int:
    """A port that no process of this machine uses just now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _address(interface: str) -> str | None:
    """The IPv4 address of an interface."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None
