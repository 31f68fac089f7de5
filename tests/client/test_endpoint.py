from __future__ import annotations

import pytest

from tnxctl.endpoint import parse_endpoint
from tnxctl.protocol.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("192.168.1.100", "tcp://192.168.1.100:5555"),
        ("192.168.1.100:6000", "tcp://192.168.1.100:6000"),
        ("localhost", "tcp://localhost:5555"),
        ("gpu-box.example.org:1", "tcp://gpu-box.example.org:1"),
        ("gpu_box.example.org.", "tcp://gpu_box.example.org.:5555"),
        ("tcp://gpu-box", "tcp://gpu-box:5555"),
        ("tcp://127.0.0.1:65535", "tcp://127.0.0.1:65535"),
        ("::1", "tcp://[::1]:5555"),
        ("[::1]", "tcp://[::1]:5555"),
        ("[::1]:6000", "tcp://[::1]:6000"),
        ("tcp://[fe80::1%eth0]:6000", "tcp://[fe80::1%eth0]:6000"),
        ("2001:DB8:0::1", "tcp://[2001:db8::1]:5555"),
        ("ipc:///run/tnx.sock", "ipc:///run/tnx.sock"),
        ("ipc:///" + 106 * "x", "ipc:///" + 106 * "x"),
    ],
)
def test_accepts(text: str, endpoint: str) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        " localhost",
        "localhost\n",
        "two words",
        ":5555",
        "localhost:",
        "localhost:0",
        "localhost:65536",
        "localhost:http",
        "localhost:+5",
        "localhost:٣",
        "256.1.1.1",
        "1.2.3",
        "127.0.0.1.",
        "-box",
        "a..b",
        64 * "a",
        5 * (60 * "a" + ".") + "org",
        "*:5555",
        "box;other:5555",
        "box/path",
        "bücher.example",
        "[::1",
        "[::1]5555",
        "[localhost]:5555",
        "[::1]:",
        "::g",
        "tcp://",
        "http://localhost",
        "udp://localhost:5555",
        "TCP://localhost",
        "ipc://",
        "ipc:///run/\0",
        "ipc:///" + 107 * "x",
        None,
        5555,
        b"localhost",
    ],
)
def test_refuses_and_names(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_endpoint(text)
    assert repr(text) in caught.value.message
