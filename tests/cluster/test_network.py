"""Which interface carries an address, and that what the user has set stays."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from rlhf.cluster.network import GLOO, NCCL, VLLM, choose_interfaces, interface_of


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


def test_gloo_always_and_nccl_between_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = interface_of("127.0.0.1")
    choose_interfaces("127.0.0.1", several_nodes=False)
    assert (os.environ[GLOO], os.environ.get(NCCL)) == (loopback, None)
    choose_interfaces("127.0.0.1", several_nodes=True)
    assert os.environ[NCCL] == loopback
    assert os.environ[VLLM] == "127.0.0.1"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO, "mine")
    choose_interfaces("127.0.0.1", several_nodes=True)
    assert os.environ[GLOO] == "mine"


def test_an_address_of_no_interface_changes_nothing() -> None:
    choose_interfaces("192.0.2.77", several_nodes=True)
    assert GLOO not in os.environ
    assert NCCL not in os.environ
