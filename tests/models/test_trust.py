"""Whom a model repository trusts, and what a manifest promises."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from tnxd.models import repository
from tnxd.models.trust import Guard, TrustedFiles


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """REPOSITORY/net/1 with three files, one of them deeper."""
    version = tmp_path / "models/net/1"
    (version / "layers").mkdir(parents=True)
    (version / "model.safetensors").write_bytes(b"weights")
    (version / "network.py").write_text("")
    (version / "layers/__init__.py").write_text("")
    return tmp_path / "models"


def check(root: Path, *, require_manifest: bool = False) -> TrustedFiles:
    return TrustedFiles.check(Guard.of(root), root / "net/1", require_manifest=require_manifest, modules=True)


def sign(version: Path) -> Path:
    """Write the manifest as sha256sum(1) does."""
    files = sorted(path for path in version.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(version)}\n" for path in files]
    sums = version / "SHA256SUMS"
    sums.write_text("".join(lines))
    return sums


# --- permissions ---------------------------------------------------------------------------------------------


def test_what_only_its_owner_may_write_is_trusted(root: Path) -> None:
    files = check(root)
    with files.open(files.directory / "model.safetensors") as file:
        assert file.read() == b"weights"


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("what", ["net", "net/1", "net/1/network.py", "net/1/layers", "net/1/layers/__init__.py"])
def test_what_others_may_write_is_refused(root: Path, what: str, mode: int) -> None:
    path = root / what
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(PermissionDenied) as caught:
        check(root)
    assert caught.value.message.startswith(f"{what} is writable by others than its owner")
    assert f"chmod go-w {path}" in caught.value.message
    assert "net" in "".join(repository.scan(root).failures)


@pytest.mark.parametrize("what", [".", ".."])
def test_the_repository_and_the_directories_above_it_count(root: Path, what: str) -> None:
    path = (root / what).resolve()
    path.chmod(0o777)
    with pytest.raises(PermissionDenied, match=f"{path} is writable"):
        Guard.of(root)


def test_above_the_repository_a_sticky_bit_is_enough(root: Path) -> None:
    root.parent.chmod(0o1777)
    check(root)
    root.chmod(0o1777)
    with pytest.raises(PermissionDenied):
        check(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["net", "net/1/network.py", ".."])
def test_what_belongs_to_somebody_else_is_refused(root: Path, what: str) -> None:
    os.chown(root / what, 12345, -1)
    with pytest.raises(PermissionDenied, match="belongs to user 12345"):
        check(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_of_the_repository_is_trusted(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        os.chown(path, 12345, -1)
    check(root)


# --- symbolic links ------------------------------------------------------------------------------------------


def test_links_within_the_repository_are_followed(root: Path) -> None:
    (root / "shared").mkdir()
    (root / "shared/weights").write_bytes(b"weights")
    (root / "net/1/model.safetensors").unlink()
    (root / "net/1/model.safetensors").symlink_to("../../shared/weights")
    files = check(root)
    with files.open(files.directory / "model.safetensors") as file:
        assert file.read() == b"weights"
    (root / "shared").chmod(0o777)  # on the way to it
    with pytest.raises(PermissionDenied, match="shared is writable"):
        check(root)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../outside"])
def test_links_that_lead_out_are_refused(root: Path, target: str) -> None:
    (root.parent / "outside").write_text("")
    (root / "net/1/vocabulary").symlink_to(target)
    with pytest.raises(PermissionDenied, match="net/1/vocabulary leads out of the model repository"):
        check(root)
    assert "net@1" in repository.scan(root).failures


def test_a_version_that_leads_out_is_refused(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    (root.parent / "elsewhere/model.pt2").write_text("")
    (root / "net/2").symlink_to(root.parent / "elsewhere")
    catalog = repository.scan(root)
    assert "leads out of the model repository" in catalog.failures["net@2"]


@pytest.mark.parametrize("target", ["nowhere", "model.safetensors.loop"])
def test_links_that_lead_nowhere(root: Path, target: str) -> None:
    (root / "net/1/model.safetensors.loop").symlink_to(target)
    with pytest.raises((FailedPrecondition, OSError), match=r"leads nowhere|symbolic links"):
        check(root)
    assert "net@1" in repository.scan(root).failures


def test_a_link_to_the_repository_is_followed_if_it_is_safe(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert Guard.of(link).root == root
    unsafe = root.parent / "open"
    unsafe.mkdir()
    unsafe.chmod(0o777)
    (unsafe / "link").symlink_to(root)
    with pytest.raises(PermissionDenied, match="open is writable"):
        Guard.of(unsafe / "link")


def test_a_fifo_is_no_model(root: Path) -> None:
    os.mkfifo(root / "net/1/pipe")
    with pytest.raises(PermissionDenied, match="net/1/pipe is a named pipe, not a file"):
        check(root)


# --- the manifest --------------------------------------------------------------------------------------------


def test_a_manifest_that_matches(root: Path) -> None:
    sign(root / "net/1")
    check(root, require_manifest=True)


def test_a_manifest_that_is_required(root: Path) -> None:
    with pytest.raises(PermissionDenied, match="net/1/SHA256SUMS is missing"):
        check(root, require_manifest=True)


def test_a_file_that_differs(root: Path) -> None:
    sign(root / "net/1")
    (root / "net/1/layers/__init__.py").write_text("import os")
    with pytest.raises(PermissionDenied, match=r"net/1/layers/__init__.py has SHA-256 [0-9a-f]{64}, net/1/SHA256SUMS"):
        check(root)


def test_a_file_that_is_not_listed(root: Path) -> None:
    sign(root / "net/1")
    (root / "net/1/more.py").write_text("")
    with pytest.raises(PermissionDenied, match=r"SHA256SUMS does not list more.py"):
        check(root)


def test_a_file_that_is_listed_and_missing(root: Path) -> None:
    sign(root / "net/1")
    (root / "net/1/network.py").unlink()
    with pytest.raises(PermissionDenied, match=r"SHA256SUMS lists network.py, which is not there"):
        check(root)


def test_files_are_called_by_their_path_in_the_version(root: Path) -> None:
    sums = sign(root / "net/1")
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "layers" not in line))
    with pytest.raises(PermissionDenied, match=r"SHA256SUMS does not list layers/__init__.py"):
        check(root)
    sums.write_text("".join(lines))
    (root / "net/1/layers/__init__.py").unlink()
    with pytest.raises(PermissionDenied, match=r"SHA256SUMS lists layers/__init__.py, which is not there"):
        check(root)


def test_the_command_of_the_page_about_models_writes_a_manifest_that_matches(root: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    command = re.search(r"(?ms)^    (?:cd \S+ && )?(find .*? > SHA256SUMS)$", page)
    assert command is not None
    (root / "shared").mkdir()
    (root / "net/1/model.safetensors").rename(root / "shared/weights")
    (root / "net/1/model.safetensors").symlink_to("../../shared/weights")
    for file in ("__pycache__/network.pyc", "layers/__pycache__/__init__.pyc", ".staged/x", "layers/SHA256SUMS"):
        path = root / "net/1" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file)
    for _ in range(2):  # a second time it leaves the first result out
        subprocess.run(["sh", "-c", command[1]], cwd=root / "net/1", check=True, timeout=60)
        check(root, require_manifest=True)


def test_a_line_that_is_none(root: Path) -> None:
    sums = sign(root / "net/1")
    sums.write_text(sums.read_text() + "nonsense\n")
    with pytest.raises(PermissionDenied, match="line 4 is not one that sha256sum writes: 'nonsense'"):
        check(root)


def test_modules_outside_the_version_are_no_part_of_a_signed_one(root: Path) -> None:
    (root / "net/shared.py").write_text("")
    assert check(root).code == (root / "net/1", root / "net")
    sign(root / "net/1")
    files = check(root)
    assert files.code == (root / "net/1",)
    assert root / "net/shared.py" not in files.identities


# --- what is loaded is what was checked ----------------------------------------------------------------------


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_changes_after_the_check_is_not_loaded(root: Path, replace: bool) -> None:
    files = check(root)
    path = files.directory / "model.safetensors"
    if replace:
        other = root / "other"
        other.write_bytes(b"weights")
        other.replace(path)
    else:
        path.write_bytes(b"WEIGHTS")
    with pytest.raises(FailedPrecondition, match=r"net/1/model.safetensors changed"), files.open(path):
        pass


def test_a_file_that_changes_while_it_is_read_is_not_loaded(root: Path) -> None:
    files = check(root)
    path = files.directory / "model.safetensors"
    with pytest.raises(FailedPrecondition, match=r"net/1/model.safetensors changed"), files.open(path):
        path.write_bytes(b"WEIGHTS")


def test_a_file_that_was_not_there_is_not_loaded(root: Path) -> None:
    files = check(root)
    path = files.directory / "late.py"
    path.write_text("")
    with pytest.raises(FailedPrecondition, match=r"net/1/late.py is missing"), files.open(path):
        pass


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no-such-place"):
        Guard.of(tmp_path / "no-such-place")


@pytest.mark.parametrize("what", ["net/1/model.safetensors", "net/1", "net"])
def test_what_was_taken_away_while_it_was_loaded_has_changed(root: Path, what: str) -> None:
    files = check(root)
    (root / what).rename(root.parent / "away")
    with (
        pytest.raises(FailedPrecondition, match=r"net/1/model.safetensors changed while it was loaded: load it again"),
        files.open(files.directory / "model.safetensors"),
    ):
        pass
