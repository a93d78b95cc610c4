# SPDX-License-Identifier: Apache-2.0
"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from obs_kernels import files
from obs_kernels.errors import WorkFolderLockedError
from obs_kernels.files import hold_folder, whole_folder, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def failing_after(calls: int, original, error: Exception):
    """``original``, but the call number ``calls`` (from 0) raises."""
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return original(*args, **kwargs)

    return call


# files


def test_write_text_and_bytes(tmp_path: Path):
    path = write_text(tmp_path / "a" / "b" / "x.json", "grüße\n")
    assert path == tmp_path / "a" / "b" / "x.json" and path.read_bytes() == "grüße\n".encode()
    assert write_bytes(str(path), b"\x00\xff") == path and path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["x.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444  # mkstemp alone would make it private


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch, step, error):
    path = write_text(tmp_path / "x", "old")
    monkeypatch.setattr(files.os, step, failing_after(0, getattr(os, step), error))
    with pytest.raises(type(error)):
        write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


def test_a_write_is_seen_only_whole(tmp_path: Path, monkeypatch):
    """Until the rename the name does not exist, and what is renamed holds all bytes."""
    path = tmp_path / "x"
    seen = []

    def replace(source, target):
        assert not path.exists()
        seen.append((Path(source).read_bytes(), Path(source).parent))
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    write_bytes(path, b"a" * 100_000)
    assert seen == [(b"a" * 100_000, tmp_path)]  # same folder, so the rename cannot become a copy


@pytest.mark.parametrize("write", [lambda p: write_text(p, "x"), lambda p: write_bytes(p, b"x")])
def test_write_below_a_file(tmp_path: Path, write):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OSError):
        write(tmp_path / "file" / "x")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "keep"


def test_write_onto_a_folder(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "inside").write_text("keep")
    with pytest.raises(OSError):
        write_text(tmp_path / "out", "x")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["inside"]


# folders


def test_whole_folder(tmp_path: Path):
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as work:
        (work / "a").write_text("1")
        assert not target.exists() and work.parent == target.parent
    assert names(target) == ["a"] and names(target.parent) == ["out"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o555 == 0o555


def test_whole_folder_replaces(tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with whole_folder(str(target)) as work:
        (work / "new").write_text("2")
        assert names(target) == ["old"]
    assert names(target) == ["new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_block_changes_nothing(tmp_path: Path, error, existing):
    target = tmp_path / "out"
    if existing:
        target.mkdir()
        (target / "old").write_text("1")
    with pytest.raises(type(error)), whole_folder(target) as work:
        (work / "new").write_text("2")
        raise error
    assert names(tmp_path) == (["out"] if existing else [])
    assert not existing or names(target) == ["old"]


@pytest.mark.parametrize("calls", [0, 1])
def test_a_failed_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch, calls):
    """Two renames replace a folder; if the second fails, the first is undone."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    renames = 0

    def replace(source, to):
        nonlocal renames
        renames += 1
        if renames == calls + 1:
            raise OSError(5, "Input/output error")
        os.rename(source, to)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"), whole_folder(target) as work:
        (work / "new").write_text("2")
    assert target.is_dir() and names(target) == ["old"]


def test_whole_folder_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OSError), whole_folder(tmp_path / "file" / "out"):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["file"]


def test_whole_folder_does_not_follow_a_link(tmp_path: Path):
    """What a link at the target points to is not touched."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("1")
    (tmp_path / "out").symlink_to(elsewhere)
    with whole_folder(tmp_path / "out") as work:
        (work / "new").write_text("2")
    assert names(elsewhere) == ["precious"] and (tmp_path / "out" / "new").exists()


HOLD = """
import sys, time
from pathlib import Path
from obs_kernels.files import hold_folder
with hold_folder(sys.argv[1]):
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""


def test_one_process_a_work_folder(tmp_path):
    """The second one is told who holds it; a killed process holds nothing, and the text of the lock is not kept."""
    folder, sign = tmp_path / "run", tmp_path / "held"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(sign)])
    try:
        deadline = time.monotonic() + 60
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(2):
            refused = pytest.raises(WorkFolderLockedError, match=rf"in use by process {other.pid}; wait for it")
            with refused, hold_folder(folder):
                raise AssertionError("held twice")
    finally:
        other.kill()
        other.wait()
    with hold_folder(folder) as held:
        assert held == folder and (folder / ".lock.pid").read_text() == f"{os.getpid()}\n"
    assert not (folder / ".lock.pid").exists()
    with hold_folder(folder):
        pass


def test_a_failed_run_lets_go_of_its_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), hold_folder(tmp_path):
        raise ZeroDivisionError
    with hold_folder(tmp_path):
        pass
