"""Parts of the streaming server that need no daemon: tokens, terminal sizes, statuses, addresses."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crio_native.errors import FailedPrecondition, Internal, InvalidArgument, ResourceExhausted
from crio_native.streaming.portforward import parse_port
from crio_native.streaming.programs import Options
from crio_native.streaming.remotecommand import V2, V4, _exit_status, _failure, parse_sizes, stream_names
from crio_native.streaming.server import StreamServer
from crio_native.streaming.settings import Settings
from crio_native.streaming.tokens import Tokens


def test_a_token_is_good_once() -> None:
    tokens: Tokens[str] = Tokens()
    token = tokens.give("meaning")
    assert tokens.take("another") is None
    assert tokens.take(token) == "meaning"
    assert tokens.take(token) is None


def test_a_token_expires() -> None:
    tokens: Tokens[str] = Tokens(lifetime=0.0, count_max=2)
    assert tokens.take(tokens.give("late")) is None
    for _ in range(10):
        tokens.give("expired ones make room")


def test_tokens_are_bounded() -> None:
    tokens: Tokens[int] = Tokens(count_max=3)
    given_out = [tokens.give(number) for number in range(3)]
    with pytest.raises(ResourceExhausted, match="3 streaming URLs"):
        tokens.give(4)
    assert tokens.take(given_out[1]) == 1
    tokens.give(5)


def test_only_one_of_many_threads_gets_a_token() -> None:
    tokens: Tokens[str] = Tokens()
    token = tokens.give("once")
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(tokens.take(token))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == [None] * 19 + ["once"]


@pytest.mark.parametrize(
    ("text", "sizes", "rest"),
    [
        ('{"Width":80,"Height":24}', [(24, 80)], ""),
        ('{"Width":80,"Height":24}\n {"Height":1,"Width":2}', [(24, 80), (1, 2)], ""),
        ('{"Width":80,', [], '{"Width":80,'),
        ('{"Width":0,"Height":24}', [], ""),
        ('{"Width":70000,"Height":24}', [], ""),
        ('{"Width":true,"Height":24}', [], ""),
        ('{"Width":"80","Height":24}', [], ""),
        ("[1,2] 7 null {}", [], ""),
        ('{"Width":80,"Height":24}garbage', [(24, 80)], "garbage"),
        ("[" * 100_000, [], ""),
        ("x" * 5000, [], ""),
    ],
)
def test_terminal_sizes(text: str, sizes: list[tuple[int, int]], rest: str) -> None:
    assert parse_sizes(text) == (sizes, rest)


@given(st.text(max_size=200))
def test_terminal_sizes_of_any_text(text: str) -> None:
    sizes, rest = parse_sizes(text)
    assert len(rest) <= len(text) and all(0 < side <= 65535 for size in sizes for side in size)


@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)), max_size=5), st.integers(0, 200))
def test_terminal_sizes_in_two_pieces(sizes: list[tuple[int, int]], cut: int) -> None:
    text = "".join(json.dumps({"Width": width, "Height": height}) for height, width in sizes)
    first, rest = parse_sizes(text[:cut])
    second, rest = parse_sizes(rest + text[cut:])
    assert (first + second, rest) == (sizes, "")


def test_the_streams_that_a_client_opens() -> None:
    everything = Options(stdin=True, stdout=True, stderr=True)
    assert stream_names(everything, V4) == ["error", "stdin", "stdout", "stderr"]
    terminal = Options(stdin=True, stdout=True, tty=True)
    assert stream_names(terminal, V4) == ["error", "stdin", "stdout", "resize"]
    assert stream_names(terminal, V2) == ["error", "stdin", "stdout"], "sizes came with the third version"


def test_statuses_are_what_kubernetes_clients_decode() -> None:
    """As metav1.Status: the keys, and the types of their values."""
    assert _exit_status(0) == {"metadata": {}, "status": "Success"}
    failed = _exit_status(3)
    assert failed["reason"] == "NonZeroExitCode"
    assert failed["details"] == {"causes": [{"reason": "ExitCode", "message": "3"}]}
    broken = _failure(Internal("no such thing"))
    assert (broken["reason"], broken["code"]) == ("InternalError", 500) and "no such thing" in broken["message"]


@pytest.mark.parametrize("text", ["", "0", "-1", "65536", "8080 ", "٣", "1e3", "0x50", "9" * 5000])
def test_ports_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="1 to 65535"):
        parse_port(text)


def test_ports() -> None:
    assert (parse_port("1"), parse_port("65535")) == (1, 65535)


def test_urls_name_an_address_that_reaches_us() -> None:
    from crio_native.streaming.remotecommand import Command

    command = Command(Options(), lambda: pytest.fail("nobody connects"))
    for address, host in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("", "127.0.0.1")):
        server = StreamServer(Settings(address=address))
        try:
            url = server.url("exec", command)
            assert url.startswith(f"http://{host}:")
            port = int(url.split("/")[2].rsplit(":", 1)[1])
            socket.create_connection((host.strip("[]"), port), 5).close()
        finally:
            server.close()


def test_an_address_that_cannot_be_had() -> None:
    with pytest.raises(InvalidArgument, match=r"crio\.api\.stream_address"):
        StreamServer(Settings(address="no.such.host.invalid"))
    with pytest.raises(FailedPrecondition, match=r"203\.0\.113\.1"):
        StreamServer(Settings(address="203.0.113.1"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(FailedPrecondition, match="in use"):
        StreamServer(Settings(port=taken.getsockname()[1]))
