"""Admission at the bridge: addresses, TLS, tokens and their roles."""

from __future__ import annotations

import signal
import ssl
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from bridges import SECONDS, Bridge, running_bridge, until
from conftest import Daemon
from tnxctl.bridge import addresses, tls
from tnxctl.bridge.access import Access
from tnxctl.bridge.bridge import access_of
from tnxctl.bridge.settings import Settings
from tnxctl.keys import tokens
from tnxctl.keys.authorized import Role as AuthorizedRole
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument, PermissionDenied, Unauthenticated
from tnxctl.protocol.roles import LEAST_ROLES, Role
from tool import run

GOOD = b'{"model": "digits", "input_data": [[%s]]}' % b", ".join([b"1"] * 64)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate of localhost by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    return make_certificate(folder, "localhost")


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    certfile, keyfile = folder / f"{name}.pem", folder / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    names = ("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost")
    subprocess.run(
        [*command.split(), *names, "-keyout", keyfile, "-out", certfile], check=True, capture_output=True, timeout=60
    )
    return certfile, keyfile


# --- addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("127.0.0.1", ("127.0.0.1", 7)),
        ("localhost:80", ("localhost", 80)),
        ("[::1]:8000", ("::1", 8000)),
        ("::1", ("::1", 7)),
        ("[::]", ("::", 7)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_addresses_as_they_are_typed(text: str, address: tuple[str, int]) -> None:
    assert addresses.parse(text, 7) == address
    assert addresses.parse(addresses.spell(address), 9) == address


@pytest.mark.parametrize(
    "text", ["", ":8000", "http://127.0.0.1:80", "1.2.3", "a b:80", "host:99999", "host:x", "[::1", "[1.2.3:4", "[x]"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidArgument, match="address"):
        addresses.parse(text, 7)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "gpu-box:0"])
@pytest.mark.parametrize("option", ["--listen", "--grpc"])
def test_an_address_that_others_reach_needs_tls_or_a_word(option: str, address: str) -> None:
    done = run("bridge", option, address)
    assert done.exit_code == 5
    assert f"{address} can be reached by others" in done.stderr
    assert "give --certfile and --keyfile for TLS, or --insecure" in done.stderr


def test_an_address_of_somebody_else(bridge: Bridge) -> None:
    for workers in ("1", "2"):
        done = run("bridge", "--listen", f"127.0.0.1:{bridge.port}", "--workers", workers)
        assert done.exit_code == 4
        assert done.stderr == f"Error: cannot listen on 127.0.0.1:{bridge.port}: Address already in use\n"


def test_without_tokens_nobody_from_another_host_changes_what_is_served() -> None:
    for listen, grpc, role in (
        ("127.0.0.1", None, Role.ADMIN),
        ("0.0.0.0", None, Role.PREDICT),
        ("127.0.0.1", ("::", 1), Role.PREDICT),
    ):
        access = access_of(Settings(endpoints=("tcp://x:1",), listen=(listen, 1), grpc=grpc, insecure=True))
        for verb, least in LEAST_ROLES.items():
            if role >= least:
                assert access.admit("", verb, "1.2.3.4:5") == "1.2.3.4:5"
            else:
                with pytest.raises(PermissionDenied, match=f"is for the role {least.title}, and 1.2.3.4:5 has predict"):
                    access.admit("", verb, "1.2.3.4:5")


# --- TLS -----------------------------------------------------------------------------------------------------


def test_tls(daemon: Daemon, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    certfile, keyfile = tmp_path / "chain.pem", tmp_path / "key.pem"
    for source, target in zip(certificate, (certfile, keyfile), strict=True):
        target.write_bytes(source.read_bytes())
    trusting = ssl.create_default_context(cafile=certfile)
    other = make_certificate(tmp_path, "other")
    arguments = ("--certfile", str(certfile), "--keyfile", str(keyfile))
    with running_bridge(tmp_path, daemon.endpoint, *arguments) as bridge:
        with bridge.connect(trusting) as peer:
            assert peer.socket.version() in ("TLSv1.2", "TLSv1.3")  # type: ignore[attr-defined]
            assert peer.ask("POST", "/predict", GOOD).status == 200
            assert peer.ask("POST", "/predict", b"[" * 300_000).status == 400
        with bridge.connect() as plain:
            plain.send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"HTTP" not in plain.socket.recv(100)
        old = ssl.create_default_context(cafile=certfile)
        with warnings.catch_warnings(action="ignore"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            bridge.connect(old)

        for source, target in zip(other, (certfile, keyfile), strict=True):
            target.write_bytes(source.read_bytes())
        bridge.process.send_signal(signal.SIGHUP)
        await_log(bridge, "read tokens and certificate again")
        with pytest.raises(ssl.SSLCertVerificationError):
            bridge.connect(trusting)
        renewed = ssl.create_default_context(cafile=other[0])
        certfile.write_bytes(certificate[0].read_bytes())  # one of the two files is new, and the other one is not yet
        bridge.process.send_signal(signal.SIGHUP)
        await_log(bridge, "the key is not that of the certificate")
        with bridge.connect(renewed) as peer:
            assert peer.ask("GET", "/health").status == 200
        keyfile.write_text("")
        bridge.process.send_signal(signal.SIGHUP)
        await_log(bridge, "not a certificate and its key")
        with bridge.connect(renewed) as peer:
            assert peer.ask("GET", "/health").status == 200


def test_a_mistake_in_one_file_leaves_the_others_as_they_were(
    daemon: Daemon, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    trusting = ssl.create_default_context(cafile=certificate[0])
    keyfile, path = tmp_path / "key.pem", tmp_path / "tokens.toml"
    keyfile.write_bytes(certificate[1].read_bytes())
    bearer = f"Bearer {tokens.add(path, 'alice', 'predict')}"
    arguments = ("--certfile", str(certificate[0]), "--keyfile", str(keyfile), "--tokens", str(path))
    with running_bridge(tmp_path, daemon.endpoint, *arguments) as bridge:
        tokens.remove(path, "alice")
        keyfile.write_text("")
        bridge.process.send_signal(signal.SIGHUP)
        await_log(bridge, "all stays as it was: ")
        with bridge.connect(trusting) as peer:
            assert peer.ask("GET", "/health", Authorization=bearer).status == 200


def await_log(bridge: Bridge, text: str) -> None:
    ends = time.monotonic() + SECONDS
    while text not in bridge.log.read_text():
        assert time.monotonic() < ends, bridge.log.read_text()
        time.sleep(0.02)  # between two looks: nothing tells of a line in a file


def test_mistakes_with_certificates_are_sentences(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    certfile, keyfile = certificate
    encrypted = tmp_path / "encrypted.key"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", keyfile, "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    other = make_certificate(tmp_path, "other")
    (tmp_path / "empty").touch()
    for given, sentence in (
        ((tmp_path / "nowhere", keyfile), "nowhere: No such file"),
        ((certfile, other[1]), "the key is not that of the certificate"),
        ((keyfile, certfile), "not a certificate and its key in PEM"),
        ((certfile, tmp_path / "empty"), "not a certificate and its key in PEM"),
        ((certfile, encrypted), "encrypted.key: the key is encrypted"),
    ):
        with pytest.raises(InvalidArgument) as found:
            tls.context(*map(str, given))
        assert sentence in found.value.message
        done = run("bridge", "--certfile", given[0], "--keyfile", given[1], "--listen", "127.0.0.1:0")
        assert (done.exit_code, sentence in done.stderr) == (5, True)
    assert "go together" in run("bridge", "--certfile", certfile).stderr


# --- tokens --------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    path = tmp_path / "tokens.toml"
    roles: tuple[AuthorizedRole, ...] = ("observe", "predict", "admin")
    return path, {role: tokens.add(path, f"a-{role}", role) for role in roles}


def test_each_role_may_ask_for_what_the_daemons_own_keys_may(listed: tuple[Path, dict[str, str]]) -> None:
    path, given = listed
    access = Access(path, Role.ADMIN)
    for role, token in given.items():
        for verb, least in LEAST_ROLES.items():
            if Role[role.upper()] >= least:
                assert access.admit(f"Bearer {token}", verb, "1.2.3.4:5") == f"a-{role}"
            else:
                with pytest.raises(PermissionDenied, match=f"is for the role {least.title}, and a-{role} has {role}$"):
                    access.admit(f"Bearer {token}", verb, "1.2.3.4:5")
    assert access.admit("", None, "1.2.3.4:5") == "1.2.3.4:5"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer x", "Bearer " + "x" * 2000, "Bearer \xff\x00", "{token}"]
)
def test_what_is_no_token(listed: tuple[Path, dict[str, str]], header: str) -> None:
    path, given = listed
    access = Access(path, Role.ADMIN)
    with pytest.raises(Unauthenticated):
        access.admit(header.format(token=given["admin"]), wire.Health, "1.2.3.4:5")
    access.admit(f"bearer  {given['admin']} ", wire.Health, "1.2.3.4:5")


def test_tokens_at_a_bridge(daemon: Daemon, tmp_path: Path, listed: tuple[Path, dict[str, str]]) -> None:
    path, given = listed
    bearers = {role: {"Authorization": f"Bearer {token}"} for role, token in given.items()}
    with running_bridge(tmp_path, daemon.endpoint, "--tokens", str(path)) as bridge, bridge.connect() as peer:
        refused = peer.ask("GET", "/health")
        assert (refused.status, refused.headers["www-authenticate"]) == (401, 'Bearer realm="tensornext"')
        assert "Authorization: Bearer TOKEN" in refused.error
        assert peer.ask("POST", "/predict", GOOD, Authorization="Bearer x").status == 401
        assert peer.ask("GET", "/nowhere").status == 404
        for probe in ("live", "ready"):
            until(lambda probe=probe: peer.ask("GET", f"/v2/health/{probe}").status, lambda status: status == 200)
        assert peer.ask("GET", "/health", **bearers["observe"]).status == 200
        refused = peer.ask("POST", "/predict", GOOD, **bearers["observe"])
        assert (refused.status, refused.error) == (403, "predict is for the role predict, and a-observe has observe")
        assert peer.ask("POST", "/predict", GOOD, **bearers["predict"]).status == 200

        tokens.remove(path, "a-predict")
        bridge.process.send_signal(signal.SIGHUP)
        await_log(bridge, "read tokens")
        assert peer.ask("POST", "/predict", GOOD, **bearers["predict"]).status == 401
        path.write_text("[tokens.x")
        bridge.process.send_signal(signal.SIGHUP)
        await_log(bridge, f"all stays as it was: {path}: not TOML")
        assert peer.ask("POST", "/predict", GOOD, **bearers["admin"]).status == 200
        assert not any(token in bridge.log.read_text() for token in given.values())


def test_a_file_with_a_mistake_ends_the_start(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    for text, sentence in (("[tokens.x]\nrole = 3\n", "tokens.toml:2: tokens.x.role"), (None, "No such file")):
        if text is not None:
            path.write_text(text)
        else:
            path.unlink()
        done = run("bridge", "--tokens", path, "--listen", "127.0.0.1:0")
        assert (done.exit_code, sentence in done.stderr) == (5, True), done.stderr
