"""Network interfaces and ports of a node.

By default gloo binds to the interface of the machine's own host name, which is often the loopback: ranks on other nodes
then wait forever. Standard library only.
"""

import fcntl
import random
import socket
import struct
from contextlib import suppress
from pathlib import Path

SIOCGIFADDR = 0x8915
CONNECTION_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # those that Linux gives to connections
PORTS = range(20_000, 32_768)


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
    """A port that no process of this machine uses, and that no connection takes before rank 0 listens there.

    Rank 0 imports for seconds before it listens. On a busy machine a connection may get the port until then if it is
    one of those that the kernel gives to connections, so it is another one wherever there is another.
    """
    try:
        first, last = map(int, CONNECTION_PORTS.read_text().split())
    except OSError:
        first, last = 32_768, 60_999  # Linux's own choice
    others = [port for port in PORTS if not first <= port <= last]
    # in a random order, as several jobs may look for a port at once
    for port in (*random.SystemRandom().sample(others, len(others)), 0):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError("no port of this machine is free")


def _address(interface: str) -> str | None:
    """The IPv4 address of an interface."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None
