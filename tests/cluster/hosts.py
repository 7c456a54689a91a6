"""Two hosts on one machine: network namespaces joined by a cable (a veth pair), and a Ray node in each.

Everything inside a namespace has ports and interfaces of its own, so nothing here meets other tests or other clusters.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf.cluster.network import INTERFACES

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 6379
TIMEOUT_S = 300


class CannotMakeHosts(Exception):
    """This machine does not let us make network namespaces; the message says why."""


class TwoHosts:
    """Make it, `start` Ray on it, and `remove` it whatever happened."""

    def __init__(self) -> None:
        """
        Raises:
            CannotMakeHosts: no `ip` command, no root, or a kernel that refuses.
        """
        if shutil.which("ip") is None:
            raise CannotMakeHosts("the command `ip` (package iproute2) is missing")
        if os.geteuid() != 0:
            raise CannotMakeHosts("network namespaces need root")
        mark = f"rl{os.getpid()}"
        self.names = (f"{mark}a", f"{mark}b")
        self._temporary = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))  # short: Ray puts Unix sockets there
        # The head turns on tokens by itself; a joining node and a driver must be told.
        inherited = {name: value for name, value in os.environ.items() if name not in INTERFACES}
        self._env = inherited | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._env |= {"RAY_DISABLE_IMPORT_WARNING": "1", "PYTHONPATH": str(ROOT)}
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.remove()
            raise CannotMakeHosts(f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}") from error

    def _make(self) -> None:
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", first, "netns", first, "type", "veth", "peer", "name", second, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def start(self) -> None:
        """A Ray head on the first host; a node that offers `second_host` on the second. Each has four CPU places."""
        head = ("--head", f"--port={PORT}", f"--temp-dir={self._temporary}", "--include-dashboard=false")
        joining = (f"--address={ADDRESSES[0]}:{PORT}", '--resources={"second_host": 1}')
        for host, options in enumerate((head, joining)):
            node = ("start", f"--node-ip-address={ADDRESSES[host]}", "--num-cpus=4", "--disable-usage-stats")
            command = [sys.executable, "-m", "ray.scripts.scripts", *node, *options]
            subprocess.run(self._on(host, command), env=self._env, check=True, capture_output=True, timeout=TIMEOUT_S)

    def popen(self, host: int, *arguments: str) -> subprocess.Popen[str]:
        """`rlhf ARGUMENTS` on a host."""
        command = self._on(host, [sys.executable, "-m", "rlhf.cli", *arguments])
        return subprocess.Popen(
            command, cwd=ROOT, env=self._env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def processes(self, host: int) -> dict[int, str]:
        """Process id -> command line of everything that runs on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=False)
        found = {}
        for pid in map(int, listed.stdout.split()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has just ended
                continue
        return found

    def kill_node(self, host: int) -> None:
        """End a host's Ray node as a crash would."""
        raylets = [pid for pid, command in self.processes(host).items() if "raylet/raylet " in command]
        assert len(raylets) == 1, raylets
        os.kill(raylets[0], signal.SIGKILL)

    def remove(self) -> None:
        """End everything on both hosts, and the hosts."""
        end = time.monotonic() + TIMEOUT_S
        for host, name in enumerate(self.names):
            while (running := self.processes(host)) and time.monotonic() < end:
                for pid in running:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _on(self, host: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *command]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
