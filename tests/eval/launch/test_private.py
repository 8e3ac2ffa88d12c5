"""Privacy of Ray's files on a shared machine. Tests with Ray itself: tests/journeys/test_launcher.py."""

import stat
from pathlib import Path

import pytest
from filelock import FileLock

from eval.launch import private as launch_private
from eval.launch.private import keep_token_private, own_folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A temporary folder and a home folder for one test."""
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(launch_private.os, "access", lambda path, how: False)
    monkeypatch.setattr(launch_private.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path


def test_the_folder_is_private_and_removed_at_the_end(machine):
    with own_folder() as given:
        assert given is not None
        inner = Path(given)
        inner.mkdir(parents=True)
        inner.chmod(0o777)  # as Ray does
        (inner / "session_latest").symlink_to("nowhere")
        assert mode(inner.parent) == 0o700
    assert not list((machine / "tmp").iterdir())


def test_folders_of_killed_launches_are_removed_and_used_ones_are_kept(machine):
    dead, alive, foreign = (machine / "tmp" / name for name in ("mpq-ray-dead", "mpq-ray-alive", "mpq-ray-foreign"))
    for folder in (dead, alive, foreign):
        (folder / "ray").mkdir(parents=True)
    (dead / ".lock").touch()
    with FileLock(alive / ".lock"), own_folder():
        assert not dead.exists() and alive.exists() and foreign.exists()


def test_a_folder_named_by_the_user_is_kept(machine, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(machine))
    with own_folder() as given:
        assert given is None
    assert (machine / "tmp").exists()


def test_the_token_file_is_private_and_reused(machine):
    path = machine / "home" / ".ray" / "auth_token"
    keep_token_private()
    token = path.read_text()
    assert mode(path) == 0o600 and len(token) == 64
    path.chmod(0o644)  # as Ray makes it
    keep_token_private()
    assert mode(path) == 0o600 and path.read_text() == token


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_MODE", "disabled")])
def test_no_token_file_is_made_if_none_is_needed(machine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    keep_token_private()
    assert not (machine / "home").exists()
