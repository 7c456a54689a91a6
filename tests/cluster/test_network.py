"""Which interface carries an address, who listens where, and that what the user has set stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from rlhf.cluster.network import (
    GLOO,
    INTERFACES,
    NCCL,
    VLLM,
    choose_interfaces,
    free_port,
    interface_of,
    listener,
    open_store,
)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set and then deleted, so that what a test sets is undone too.
    for name in (GLOO, NCCL, VLLM):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_every_address_of_this_machine_has_its_interface() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert entry.address in [e.address for e in psutil.net_if_addrs()[interface_of(entry.address)]], name
    assert interface_of("127.0.0.1").startswith("lo")
    assert interface_of("192.0.2.77") is None


def test_gloo_always_and_nccl_between_nodes_and_on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = interface_of("127.0.0.1")
    choose_interfaces("127.0.0.1", several_nodes=False)
    assert (os.environ[GLOO], os.environ[NCCL], os.environ[VLLM]) == (loopback, f"={loopback}", "127.0.0.1")
    other = next((address for address in own_addresses() if not address.startswith("127.")), None)
    if other is None:
        pytest.skip("this machine has the loopback only")
    for several in (False, True):
        for name in INTERFACES:
            monkeypatch.delenv(name, raising=False)
        choose_interfaces(other, several_nodes=several)
        assert os.environ[VLLM] == other
        assert os.environ[GLOO] == interface_of(other)
        assert os.environ.get(NCCL) == (f"={interface_of(other)}" if several else None)


def own_addresses() -> list[str]:
    """This machine's, of IPv4."""
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    return [entry.address for entry in entries if entry.family == socket.AF_INET]


def reachable(port: int) -> set[str]:
    """Those of this machine's addresses under which something answers at the port."""
    found = set()
    for address in own_addresses():
        with socket.socket() as probe:
            probe.settimeout(5)
            if probe.connect_ex((address, port)) == 0:
                found.add(address)
    return found


def test_a_store_listens_at_its_own_address_and_no_other() -> None:
    """torch's would listen on every interface, for whoever reaches the machine to read and write."""
    for address in own_addresses():
        port = free_port()
        store = open_store(address, port, timedelta(seconds=20), serves=True)
        reader = open_store(address, port, timedelta(seconds=20), serves=False)
        store.set("key", "value")
        assert reader.get("key") == b"value"
        assert reachable(port) == {address}
        del reader, store
        assert reachable(port) == set(), "it ends with its holder"


def test_torchs_own_store_would_be_open_to_all() -> None:
    """What the store of ours is for; if this fails, torch has become careful and `open_store` can go."""
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert reachable(port) == set(own_addresses())
    del store


def test_a_port_that_is_taken_is_named() -> None:
    with listener("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"nothing can listen at 127\.0\.0\.1:{port} \(.*in use"):
            open_store("127.0.0.1", port, timedelta(seconds=1), serves=True)


def test_behind_address_translation_a_store_is_reachable() -> None:
    """The address under which others know the machine is none of its own."""
    with listener("192.0.2.77") as bound:
        assert reachable(bound.getsockname()[1]) == set(own_addresses())


def test_a_group_meets_there(tmp_path: Path) -> None:
    """Two processes by torch's own function, as DeepSpeed calls it."""
    port = free_port()
    code = (
        "import sys, torch, torch.distributed as dist; from rlhf.cluster.network import meeting_place\n"
        "rank, port = map(int, sys.argv[1:])\n"
        "dist.init_process_group('gloo', meeting_place('127.0.0.1', port), rank=rank, world_size=2)\n"
        "total = torch.tensor([rank + 1]); dist.all_reduce(total); print(int(total)); dist.destroy_process_group()"
    )
    environment = os.environ | {GLOO: interface_of("127.0.0.1")}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(port)], env=environment, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [b"3", b"3"]


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO, "mine")
    choose_interfaces("127.0.0.1", several_nodes=True)
    assert os.environ[GLOO] == "mine"


def test_an_address_of_no_interface_changes_nothing() -> None:
    choose_interfaces("192.0.2.77", several_nodes=True)
    assert GLOO not in os.environ
    assert NCCL not in os.environ
