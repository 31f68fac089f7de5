"""Bad input over raw sockets, at a real bridge of a real daemon: a fitting status, a sentence, and it goes on."""

from __future__ import annotations

import json

import pytest

from bridges import Bridge

GOOD = json.dumps({"input_data": [[0.5] * 256]}).encode()

HEADERS = "Host: localhost\r\n"


def assert_serves(bridge: Bridge) -> None:
    assert bridge.ask("GET", "/health").document["status"] == "ready"


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/nowhere", 404, "there is nothing at /nowhere"),
        ("GET", f"/{'x' * 500}", 404, f"there is nothing at /{'x' * 79}..."),
        ("GET", "/../../etc/passwd", 404, "there is nothing at /../../etc/passwd"),
        ("GET", "/health/", 404, "there is nothing at /health/"),
        ("GET", f"/{'/' * 5000}", 404, f"there is nothing at {'/' * 80}..."),
        ("DELETE", "/health", 405, "this path takes GET, HEAD alone"),
        ("GET", "/predict", 405, "this path takes POST alone"),
        ("OPTIONS", "/predict", 405, "this path takes POST alone"),
    ],
)
def test_unknown_paths_and_methods(bridge: Bridge, method: str, path: str, status: int, sentence: str) -> None:
    with bridge.connect() as peer:
        answer = peer.ask(method, path)
        assert (answer.status, answer.error) == (status, sentence)
        assert ("allow" in answer.headers) == (status == 405)
        assert peer.ask("GET", "/health").status == 200  # on the same connection


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body is not JSON: Input data was truncated"),
        (b"null", "the body: expected object, got null"),
        (b"[1, 2]", "the body: expected object, got array"),
        (b"{}", "the body: object missing required field input_data"),
        (b'{"input_data": 1}', "input_data: expected array, got int"),
        (b'{"input_data": []}', "input_data is empty"),
        (b'{"input_data": [[]]}', "input_data[0] is empty"),
        (b'{"input_data": [1, 2]}', "input_data[0]: expected array, got int"),
        (b'{"input_data": [[1], [2, 3]]}', "input_data[1] has 2 values, and input_data[0] has 1"),
        (b'{"input_data": [[1, "a"]]}', "input_data[0][1]: expected a number, got str"),
        (b'{"input_data": [[1], [true]]}', "input_data[1][0]: expected a number, got bool"),
        (b'{"input_data": [[1], [null]]}', "input_data[1][0]: expected a number, got null"),
        (b'{"input_data": [[[1]]]}', "input_data[0][0]: expected a number, got array"),
        (b'{"input_data": [[1, NaN]]}', "the body is not JSON: invalid character at byte 20: NaN]]}"),
        (b'{"input_data": [[1e999]]}', "input_data[0][0]: number out of range"),
        (b'{"input_data": [[1, 2]]', "the body is not JSON: Input data was truncated"),
        (b'{"input_data": [[1e300]]}', "the input takes FP32, which cannot hold a number that is too large"),
        (b'{"input_data": [[1, 2]]}', "model 'mlp': input 'input' takes [-1, 256], got [1, 2]: axis 1 differs"),
        (b'{"input_data": [[1]], "prefer_gpu": 1}', "prefer_gpu: expected bool, got int"),
        (b'{"input_data": [[1]], "min_gpu_memory_mb": -1}', "min_gpu_memory_mb: expected float >= 0.0"),
        (b'{"input_data": [[1]], "model": 7}', "model: expected str, got int"),
        (b'{"input_data": [[1]], "model": "a/../b"}', "'a/../b' is not a model"),
        (b'{"input_data": [[1]], "other": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "the body is nested too deep"),
        (b'{"input_data": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "input_data[0][0]: expected a number, got array"),
        (b'{"input_data": ' + b"[" * 200_000, "input_data[0][0]: expected a number, got array"),
        (b"\xff\xfe", "the body is not JSON"),
        (b'{"input_data": [[1]], "model": "\xff"}', "the body is not JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bodies_that_are_no_request(bridge: Bridge, body: bytes, sentence: str) -> None:
    with bridge.connect() as peer:
        answer = peer.ask("POST", "/predict", body)
        assert answer.status == 400, answer
        assert answer.error.startswith(sentence), answer.error
        assert len(answer.body) < 400
        assert peer.ask("POST", "/predict", GOOD).status == 200


def test_a_large_integer_is_no_accident(bridge: Bridge) -> None:
    answer = bridge.ask("POST", "/predict", b'{"input_data": [[1%s]]}' % (b"0" * 5000))
    assert answer.status == 400, answer
    assert_serves(bridge)


def test_a_declared_length_of_two_gigabytes_is_refused_before_a_byte_of_it(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        answer = peer.send(f"POST /predict HTTP/1.1\r\n{HEADERS}Content-Length: 2147483648\r\n\r\n").response()
        assert answer.status == 413
        assert answer.error == "the body has 2147483648 bytes or more, and may have 268435456"


def test_json_has_a_limit_of_its_own_and_the_connection_goes_on(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        answer = peer.ask("POST", "/predict", b" " * (17 << 20))
        assert (answer.status, answer.error) == (413, f"the body has {17 << 20} bytes, and JSON may have {16 << 20}")
        assert peer.ask("POST", "/predict", GOOD).status == 200


def test_a_body_that_nobody_wants_is_read_away(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        assert peer.ask("POST", "/nowhere", b"x" * (8 << 20)).status == 404
        assert peer.ask("POST", "/predict", GOOD).status == 200


def test_a_body_of_whom_the_response_is_awaited_first_is_not_sent(bridge: Bridge) -> None:
    head = f"POST /nowhere HTTP/1.1\r\n{HEADERS}Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    with bridge.connect() as peer:
        answer = peer.send(head).response()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert peer.is_ended()
    with bridge.connect() as peer:
        peer.send(head.replace("/nowhere", "/predict").replace("Length: 5", f"Length: {len(GOOD)}"))
        assert peer._file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert peer._file.readline() == b"\r\n"
        assert peer.send(GOOD).response().status == 200


def test_chunked_bodies(bridge: Bridge) -> None:
    head = f"POST /predict HTTP/1.1\r\n{HEADERS}Transfer-Encoding: chunked\r\n\r\n"
    with bridge.connect() as peer:
        for step in (len(GOOD), 100, 7):
            parts = [GOOD[at : at + step] for at in range(0, len(GOOD), step)]
            peer.send(head, *(b"%x\r\n%s\r\n" % (len(part), part) for part in parts), "0\r\n\r\n")
            assert peer.response().status == 200
        peer.send(head)
        for part in (b"2;extension\r\n{}\r\n", b"0\r\nTrailer: x\r\n\r\n"):
            peer.send(part)
        assert peer.response().status == 400
        assert peer.ask("GET", "/health").status == 200


def test_a_chunk_that_lies_about_its_length(bridge: Bridge) -> None:
    head = f"POST /predict HTTP/1.1\r\n{HEADERS}Transfer-Encoding: chunked\r\n\r\n"
    for chunk in ("zz\r\n{}\r\n", "-1\r\n{}\r\n", "1\r\n{}\r\n", "ffffffffffffffffff\r\n{}\r\n"):
        with bridge.connect() as peer:
            answer = peer.send(head, chunk).response()
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert answer.error == "this is not HTTP/1.1 as it should be"
            assert peer.is_ended()


def test_pipelined_requests_are_answered_in_order(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        for number in range(50):
            peer.request(*(("GET", "/health") if number % 3 else ("POST", "/predict", GOOD)))
            if number % 7 == 0:
                peer.request("GET", "/nowhere")
        found = []
        for number in range(50):
            found.append("status" in peer.response().document)
            if number % 7 == 0:
                assert peer.response().status == 404
        assert found == [bool(number % 3) for number in range(50)]


def test_garbage_behind_a_request_is_answered_after_it(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        peer.request("POST", "/predict", GOOD)
        peer.request("GET", "/health")
        peer.send("\x00\x01garbage\r\n\r\n")
        assert "output" in peer.response().document
        assert "status" in peer.response().document
        assert (peer.response().status, peer.is_ended()) == (400, True)


def test_more_requests_than_may_wait_end_the_connection(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        peer.send(f"GET /health HTTP/1.1\r\n{HEADERS}\r\n" * 3000)
        statuses = []
        while not statuses or statuses[-1] == 200:
            answer = peer.response()
            statuses.append(answer.status)
        assert statuses[-1] == 400
        assert answer.error == "more than 64 requests wait on this connection"
        assert 2 < len(statuses) < 3000
    assert_serves(bridge)


def test_http_1_0(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        answer = peer.send("GET /health HTTP/1.0\r\n\r\n").response()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert peer.is_ended()
    with bridge.connect() as peer:
        answer = peer.send(f"POST /predict HTTP/1.0\r\nContent-Length: {len(GOOD)}\r\n\r\n", GOOD).response()
        assert answer.status == 200


@pytest.mark.parametrize(
    "text",
    [
        "garbage\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        "GET\r\n\r\n",
        "GET /health HTTP/9.9\r\n\r\n",
        f"GET /health HTTP/1.1\r\n{HEADERS}Bad Header: x\r\n\r\n",
        f"GET /health HTTP/1.1\r\n{HEADERS}X: \x00\r\n\r\n",
        f"POST /predict HTTP/1.1\r\n{HEADERS}Content-Length: -1\r\n\r\n",
        f"POST /predict HTTP/1.1\r\n{HEADERS}Content-Length: ten\r\n\r\n",
        f"POST /predict HTTP/1.1\r\n{HEADERS}Content-Length: 99999999999999999999999\r\n\r\n",
        f"POST /predict HTTP/1.1\r\n{HEADERS}Content-Length: 2\r\nContent-Length: 3\r\n\r\n",
        f"POST /predict HTTP/1.1\r\n{HEADERS}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "CONNECT example.org:80 HTTP/1.1\r\nHost: example.org\r\n\r\n",
        f"GET /h\xe9alth HTTP/1.1\r\n{HEADERS}\r\n",
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_http(bridge: Bridge, text: str) -> None:
    with bridge.connect() as peer:
        answer = peer.send(text.encode("latin-1")).response()
        assert answer.status in (400, 404, 405), answer
        assert answer.error
        assert answer.headers.get("connection") == "close" or peer.ask("GET", "/health").status == 200
    assert_serves(bridge)


@pytest.mark.parametrize(
    "text",
    [
        f"GET /health HTTP/1.1\r\n{HEADERS}X: {'x' * 40_000}\r\n\r\n",
        f"GET /{'x' * 40_000} HTTP/1.1\r\n{HEADERS}\r\n",
        f"GET /health HTTP/1.1\r\n{HEADERS}" + "X: 1\r\n" * 10_000 + "\r\n",
        f"GET /health HTTP/1.1\r\n{HEADERS}X: {'x' * 3_000_000}",
        "GET /" + "x" * 3_000_000,
        f"POST /predict HTTP/1.1\r\n{HEADERS}Content-Length: 2\r\n\r\n{{}}GET /" + "x" * 3_000_000,
    ],
    ids=["one header", "path", "many headers", "no end", "no end of the path", "no end after a request"],
)
def test_large_headers(bridge: Bridge, text: str) -> None:
    with bridge.connect() as peer:
        try:
            peer.send(text)
        except ConnectionError:  # it has hung up before all was sent
            return
        answer = peer.response()
        if answer.status == 400:
            answer = peer.response()
        assert (answer.status, answer.headers["connection"]) == (431, "close")
        assert answer.error == "the headers have more than 32768 bytes"
    assert_serves(bridge)


def test_an_upgrade_is_not_taken(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        answer = peer.ask("GET", "/health", Connection="Upgrade, HTTP2-Settings", Upgrade="h2c", HTTP2_Settings="AAMA")
        assert answer.status == 200
    with bridge.connect() as peer:
        answer = peer.ask("GET", "/health", Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Version="13")
        assert answer.status == 200


def test_head(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        answer = peer.ask("HEAD", "/health")
        assert (answer.status, answer.body) == (200, b"")
        assert int(answer.headers["content-length"]) > 50
        assert peer.ask("GET", "/health").status == 200


def test_a_page_of_another_site_is_refused(bridge: Bridge) -> None:
    """A browser sends simple requests to anywhere; it names the page."""
    with bridge.connect() as peer:
        refused = peer.ask("POST", "/predict", GOOD, Origin="https://evil.example")
        assert (refused.status, "another site" in refused.error) == (403, True)
        assert peer.ask("POST", "/predict", GOOD, Origin="null").status == 403
        assert peer.ask("POST", "/predict", GOOD, Origin="http://localhost").status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "[x]"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/stats"), ("POST", "/v2/repository/models/digits/unload")])
def test_a_site_whose_name_stands_for_this_host_is_refused(bridge: Bridge, host: str, method: str, path: str) -> None:
    """DNS rebinding: to a browser, the bridge is the site that its page came from."""
    with bridge.connect() as peer:
        for origin in ("", f"Origin: http://{host}\r\n"):
            peer.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{origin}Content-Length: 0\r\n\r\n")
            refused = peer.response()
            assert (refused.status, "is no name of this host" in refused.error) == (403, True)


@pytest.mark.parametrize(
    "host", ["LocalHost:1", "localhost.", "a.localhost", "127.0.0.1:8000", "[::1]:8000", "192.0.2.1"]
)
def test_names_of_this_host(bridge: Bridge, host: str) -> None:
    with bridge.connect() as peer:
        assert peer.send(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n").response().status == 200


def test_nothing_of_this_was_worth_a_line_in_the_log(bridge: Bridge) -> None:
    assert bridge.log.read_text() == ""
