"""Several hosts on one machine: network namespaces with an address each, cables to a switch, a real sshd in each.

All that listens does so inside the namespaces, which nothing outside of them can reach.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""


@dataclass(frozen=True)
class Host:
    """A namespace that plays a machine."""

    namespace: str
    address: str
    port: tuple[str, str]  # at the other end of its cable: the switch's namespace, and the interface in it

    def command(self, *words: str) -> list[str]:
        """A command that runs on this host."""
        return [_tool("ip"), "netns", "exec", self.namespace, *words]

    def processes(self) -> list[int]:
        """All processes on this host."""
        done = subprocess.run(
            [_tool("ip"), "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(word) for word in done.stdout.split()]

    def kill_everything(self, number: signal.Signals = signal.SIGKILL) -> None:
        """What a host's processes see of a power cut; with SIGSTOP, a host that no longer answers."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def cut_cable(self) -> None:
        """From now on nothing reaches this host, and nobody is told."""
        _ip("-n", self.port[0], "link", "set", self.port[1], "down")


def why_not() -> str | None:
    """Why this machine cannot play several hosts; None: it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not here (apt install openssh-server pdsh iproute2)"
    probe = f"deepy-{os.getpid()}-probe"
    done = subprocess.run([_tool("ip"), "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"no namespaces here: {done.stderr.strip()}"
    _ip("netns", "del", probe)
    return None


@contextmanager
def network(folder: Path, names: str = "ab") -> Iterator[tuple[Host, ...]]:
    """Set up a host for each letter of `names`, with keys in `folder`, and take everything away again."""
    switch = f"deepy-{os.getpid()}-switch"
    hosts = tuple(
        Host(f"deepy-{os.getpid()}-{name}", f"10.77.13.{number}", (switch, f"port{name}"))
        for number, name in enumerate(names, 1)
    )
    servers = []
    try:
        for namespace in (switch, *(host.namespace for host in hosts)):
            _ip("netns", "add", namespace)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts:
            port = host.port[1]
            _ip("link", "add", "eth0", "netns", host.namespace, "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        for key in ("key", "host_key"):
            _run([_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", link, "up")
            settings = folder / f"sshd_{host.address}"
            settings.write_text(SSHD.format(address=host.address, folder=folder))
            servers.append(subprocess.Popen(host.command(_tool("sshd"), "-D", "-f", str(settings))))
        for host in hosts:
            _wait_for_ssh(host, folder)
        yield hosts
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                host.kill_everything()
                _ip("netns", "del", host.namespace)
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", switch)
        for server in servers:
            server.wait(timeout=60)


def ssh_options(folder: Path) -> str:
    """What ssh needs to know to reach the hosts."""
    known = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes"
    return f"-F none -i {folder}/key {known} -o ConnectTimeout=10"


def _wait_for_ssh(host: Host, folder: Path) -> None:
    command = host.command(_tool("ssh"), *ssh_options(folder).split(), host.address, "true")
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, f"no ssh to {host.address}: {done.stderr}"
        time.sleep(0.1)


def _tool(name: str) -> str:
    return shutil.which(name, path=PATH) or name


def _ip(*words: str) -> None:
    _run([_tool("ip"), *words])


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True)
