"""Attacks on the reward service by whoever reaches its port. Every one is bounded, and a caller with the token is answered meanwhile."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from rlhf.reward.serving.connections import Bounds
from tests.reward.services import TOKEN, reward_service

HEAD = f"POST /judge HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
STRANGER = b"POST /judge HTTP/1.1\r\nHost: x\r\n"
BOUNDS = Bounds(connections=20, head_bytes=2048, head_s=0.5, request_bytes=2**20, body_s=0.5)
LONG_S = 20.0
"""How long a test waits for a connection to be closed."""


@pytest.fixture
def url(tiny_settings) -> Iterator[str]:
    settings = tiny_settings(reward={"path": "tests.reward.sample_rewards:moody", "max_waiting": 8, "deadline_s": 1.0})
    with reward_service(settings, BOUNDS) as where:
        yield where


@contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=LONG_S) as made:
        yield made


def all_said(made: socket.socket) -> bytes:
    """What the service says until it closes the connection, which it must within LONG_S."""
    said = b""
    try:
        while part := made.recv(65536):
            said += part
    except ConnectionResetError:
        pass
    return said


def send_until_closed(made: socket.socket, part: bytes, most: int) -> int:
    """How many bytes the service took before it closed the connection."""
    sent = 0
    try:
        while sent < most:
            made.sendall(part)
            sent += len(part)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


def answers(url: str, responses: int = 1) -> httpx.Response:
    return httpx.post(
        f"{url}/judge", json={"responses": ["four"] * responses}, headers={"Authorization": f"Bearer {TOKEN}"}
    )


@pytest.mark.parametrize(
    "part",
    [b"X: " + b"y" * 1000 + b"\r\n", b"y" * 1000, b"X: " + b"y" * 1000],
    ids=["many headers", "one header name", "one header"],
)
def test_a_head_without_end_is_refused(url, part):
    with connection(url) as made:
        made.sendall(STRANGER)
        assert send_until_closed(made, part, 64 * 2**20) < 64 * 2**20
    with connection(url) as made:
        made.sendall(STRANGER + part * 3)
        assert b"400 Bad Request" in all_said(made)
    assert answers(url).status_code == 200


def test_a_request_line_without_end_is_refused(url):
    with connection(url) as made:
        made.sendall(b"GET /" + b"a" * 4000)
        assert b"400 Bad Request" in all_said(made)


def test_a_long_head_in_one_piece_is_refused_and_a_body_in_the_same_piece_is_not(url):
    with connection(url) as made:
        made.sendall(HEAD + b"X: " + b"y" * 4000 + b"\r\n\r\n")
        assert b"400 Bad Request" in all_said(made)
    assert answers(url, 8).status_code == 200
    long = httpx.post(f"{url}/judge", json={"responses": ["x" * 500_000]}, headers={"Authorization": f"Bearer {TOKEN}"})
    assert long.json()["outcomes"] == [{"outcome": "score", "value": 500_000.0}]


@pytest.mark.parametrize("said", [b"", b"\r\n", b"POST", STRANGER, HEAD + b"Content-Length: 9\r\n\r\n{"])
def test_a_request_that_does_not_come_is_not_waited_for(url, said):
    with connection(url) as made:
        made.sendall(said)
        assert all_said(made) == b""


def test_a_request_that_drips_is_not_waited_for(url):
    with connection(url) as made:
        begun = time.monotonic()
        with pytest.raises(OSError):
            for byte in STRANGER * 40:
                made.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - begun < LONG_S


def test_a_kept_connection_that_drips_blank_lines_is_closed(url):
    with connection(url) as made:
        made.sendall(HEAD + b"Content-Length: 20\r\n\r\n" + b'{"responses":["abc"]}'[:20])
        answer = http.client.HTTPResponse(made)
        answer.begin()
        assert answer.read()
        made.sendall(b"\r\n")
        assert all_said(made) == b""


@pytest.mark.parametrize("head", [HEAD, STRANGER])
def test_a_body_without_end_is_cut(url, head):
    with connection(url) as made:
        made.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        assert send_until_closed(made, b"1\r\nx\r\n" * 1000, 64 * 2**20) < 64 * 2**20
    with connection(url) as made:  # trailers, which are headers once more
        made.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n")
        assert send_until_closed(made, b"X: " + b"y" * 1000 + b"\r\n", 64 * 2**20) < 64 * 2**20
    assert answers(url).status_code == 200


def test_a_stranger_is_told_and_shown_out(url):
    with connection(url) as made:
        made.sendall(STRANGER + b"Content-Length: 1000000\r\n\r\n" + b"x" * 100)
        said = all_said(made)
        assert b"401 Unauthorized" in said and TOKEN.encode() not in said


def test_requests_are_not_sent_ahead(url):
    one = HEAD + b'Content-Length: 22\r\n\r\n{"responses":["slow"]}'
    with connection(url) as made:
        made.sendall(one * 50)
        assert all_said(made).count(b"HTTP/1.1") == 1
    assert answers(url).status_code == 200


def test_silent_connections_keep_nobody_out(url):
    """More of them than there may be connections, again and again."""
    where = urlsplit(url)
    silent = []
    try:
        for _ in range(200):
            silent.append(socket.create_connection((where.hostname, where.port)))
            if len(silent) % 50 == 0:
                assert answers(url).status_code == 200
    finally:
        for made in silent:
            made.close()


def test_one_request_does_not_pass_the_bound_on_waiting(url):
    refused = answers(url, 9)
    assert refused.status_code == 413 and "at most 8 (`reward.max_waiting`" in refused.json()["error"]
    assert answers(url, 8).status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"CONNECT * HTTP/1.1\r\n\r\n",
        b"\x00" * 50,
    ]
    + [
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET \xff HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_without_a_trace(url, capfd, said):
    with connection(url) as made:
        made.sendall(said)
        made.shutdown(socket.SHUT_WR)
        assert all_said(made)[9:12] in (b"", b"400", b"401")
    with connection(url) as made:  # one that leaves in the middle of a body
        made.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert answers(url).status_code == 200
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown and TOKEN not in shown


def test_a_websocket_is_none(url):
    with connection(url) as made:
        upgrade = (
            b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        made.sendall(b"GET /judge HTTP/1.1\r\nHost: x\r\n" + upgrade)
        assert b"401 Unauthorized" in all_said(made)
