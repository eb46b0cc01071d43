"""Network interfaces and ports of a node.

By default gloo binds to the interface of the machine's own host name, which is often the loopback: ranks on other nodes
then wait forever. Standard library only.
"""

import fcntl
import socket
import struct
from contextlib import suppress

SIOCGIFADDR = 0x8915


def interface_towards(address: str) -> str | None:
    """The interface through which this machine reaches `address`; None if that cannot be determined.

    address: host name or IPv4 address of rank 0, which may be on this node.
    """
    # UnicodeError: a name that cannot be one, such as with two dots in a row.
    with suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        target = socket.gethostbyname(address)
        probe.connect((target, 9))  # sends nothing, but chooses the route
        own = probe.getsockname()[0]
        return next((name for _, name in socket.if_nameindex() if _address(name) == own), None)
    return None


def free_port() -> int:
    """A port that no process of this machine uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _address(interface: str) -> str | None:
    """The IPv4 address of an interface."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None
