"""The publish protocol: whole or not there, whatever happens at whichever step of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from prefloop.records import PrefloopError
from prefloop.training import checkpoint
from prefloop.training.checkpoint import MANIFEST, newest_whole, save_atomically, verify

CONTENT = {"weights.bin": bytes(range(256)) * 40, "config.json": b'{"a": 1}', "deep/more.txt": b"more"}
BLOCK = 4096


class PowerCutError(BaseException):
    """Nothing of the process runs after it, not even its handlers of errors."""


def write(directory: Path) -> None:
    (directory / "deep").mkdir()
    for name, data in CONTENT.items():
        (directory / name).write_bytes(data)


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def saved(tmp_path):
    target = tmp_path / "states" / "step-00000002"
    save_atomically(target, write)
    return target


def test_what_is_saved_is_verified_and_listed(saved):
    assert content(saved) == CONTENT
    listed = json.loads((saved / MANIFEST).read_text())
    assert {name: size for name, (size, _) in listed.items()} == {name: len(data) for name, data in CONTENT.items()}
    assert len(verify(saved)) == 64
    assert list(saved.parent.iterdir()) == [saved]


def test_what_is_there_is_never_written_again(saved):
    before = {path: path.stat().st_ino for path in saved.rglob("*")}

    def refuse(directory: Path) -> None:
        raise AssertionError("written again")

    assert save_atomically(saved, refuse) == verify(saved)
    assert {path: path.stat().st_ino for path in saved.rglob("*")} == before


def test_a_damaged_one_under_the_name_is_set_aside_and_saved_anew(saved, caplog):
    manifest_hash = verify(saved)
    (saved / "config.json").write_bytes(b'{"a": 2}')
    assert save_atomically(saved, write) == manifest_hash
    assert (saved.with_name("bad-step-00000002") / "config.json").read_bytes() == b'{"a": 2}'
    assert "config.json is damaged; it is set aside as bad-step-00000002" in caplog.text


# --- every step of the protocol -----------------------------------------------------------------------------------


class Interrupter:
    """Raises before, or right after, one step of the protocol, and remembers what was synced."""

    def __init__(self, monkeypatch, error=None, at=-1, after=False):
        self.error, self.at, self.after, self.log, self.synced = error, at, after, [], set()
        for owner, name in ((Path, "mkdir"), (Path, "write_bytes"), (os, "fsync"), (Path, "rename")):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name))

    def watched(self, original, name):
        def step(first, *args, **kwargs):
            number = len(self.log)
            self.log.append(name)
            if number == self.at and not self.after:
                raise self.error
            result = original(first, *args, **kwargs)
            if name == "fsync":
                self.synced.add(os.fstat(first).st_ino)
            if number == self.at:
                raise self.error
            return result

        return step


def count_steps(folder: Path) -> int:
    save_atomically(folder / "step-00000001", write)
    with pytest.MonkeyPatch.context() as patch:
        steps = Interrupter(patch)
        save_atomically(folder / "step-00000002", write)
    # Three files and the manifest; they, the directory and the one in it, and the parent; the one rename.
    assert [steps.log.count(name) for name in ("write_bytes", "fsync", "rename")] == [4, 7, 1]
    return len(steps.log)


def interrupt(folder: Path, error: BaseException, at: int, after: bool) -> Interrupter:
    """Save step 1, then step 2 with an error at one step of it."""
    save_atomically(folder / "step-00000001", write)
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(error, PowerCutError):
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        steps = Interrupter(patch, error, at, after)
        with pytest.raises((PowerCutError, PrefloopError)):
            save_atomically(folder / "step-00000002", write)
    return steps


def each_step(tmp_path):
    for at in range(count_steps(tmp_path / "counted")):
        for after in (False, True):
            yield at, after, tmp_path / f"{at:02d}-{'after' if after else 'before'}"


def test_a_kill_at_each_step_leaves_the_old_or_the_new_whole(tmp_path):
    names = []
    for at, after, folder in each_step(tmp_path):
        interrupt(folder, PowerCutError(), at, after)
        save_atomically(folder / "step-00000003", write)  # leaves what others left alone
        shutil.rmtree(folder / "step-00000003")
        names.append(newest_whole(folder).name)
        assert content(folder / names[-1]) == CONTENT
        save_atomically(folder / "step-00000002", write)  # going on from there
        assert [path.name for path in sorted(folder.iterdir())] == ["step-00000001", "step-00000002"]
    assert names == sorted(names)  # the old one until the rename, and never again after it
    assert set(names) == {"step-00000001", "step-00000002"}


def test_saving_again_after_a_kill_clears_what_it_left(tmp_path):
    for at, after, folder in each_step(tmp_path):
        interrupt(folder, PowerCutError(), at, after)
        save_atomically(folder / "step-00000002", write)  # under the same process id, as in a container
        assert [path.name for path in sorted(folder.iterdir())] == ["step-00000001", "step-00000002"]
        assert content(folder / "step-00000002") == CONTENT


def lose(folder: Path, synced: set[int], how: str, rename_lost: bool) -> None:
    """What a power failure may leave: whatever was not synced is gone."""
    new = folder / "step-00000002"
    for directory in [new, *folder.glob(".tmp-*")]:
        for path in [p for p in directory.rglob("*") if p.is_file() and p.stat().st_ino not in synced]:
            path.unlink() if how == "missing" else os.truncate(path, path.stat().st_size // 2)
    if rename_lost and new.exists() and folder.stat().st_ino not in synced:
        new.rename(folder / ".tmp-step-00000002-1")


def test_a_power_failure_at_each_step_leaves_the_old_or_the_new_whole(tmp_path):
    num_states = 0
    for how in ("missing", "torn"):
        for rename_lost in (False, True):
            for at, after, folder in each_step(tmp_path / f"{how}-{rename_lost}"):
                steps = interrupt(folder, PowerCutError(), at, after)
                lose(folder, steps.synced, how, rename_lost)
                assert content(newest_whole(folder)) == CONTENT
                num_states += 1
    assert num_states > 100
    # What was acknowledged is never lost: all of it is synced.
    folder = tmp_path / "acknowledged"
    with pytest.MonkeyPatch.context() as patch:
        steps = Interrupter(patch)
        save_atomically(folder / "step-00000002", write)
    lose(folder, steps.synced, "missing", True)
    assert newest_whole(folder).name == "step-00000002"
    assert {path.stat().st_ino for path in (tmp_path, folder)} <= steps.synced  # the new directory above it, too


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_error_at_each_step_is_one_line_and_changes_nothing(tmp_path, code):
    for at, after, folder in each_step(tmp_path):
        interrupt(folder, OSError(code, os.strerror(code)), at, after)
        if not (after and "step-00000002" in os.listdir(folder)):
            assert os.listdir(folder) == ["step-00000001"]
        save_atomically(folder / "step-00000002", write)  # the same again, with space
        assert content(newest_whole(folder)) == CONTENT


def test_the_line_of_a_disk_error_says_what_to_do(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    expected = rf"^cannot save {tmp_path}/new: No space left on device; free space and run again$"
    with pytest.raises(PrefloopError, match=expected):
        save_atomically(tmp_path / "new", write)
    assert list(tmp_path.iterdir()) == []


def test_disk_errors_of_libraries_written_in_rust_are_disk_errors(tmp_path):
    def write_like_safetensors(directory: Path) -> None:
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(PrefloopError, match=r"cannot save .*No space left on device"):
        save_atomically(tmp_path / "new", write_like_safetensors)

    def write_wrongly(directory: Path) -> None:
        raise ValueError("no such tensor")

    with pytest.raises(ValueError, match="no such tensor"):  # a mistake is no full disk
        save_atomically(tmp_path / "new", write_wrongly)
    assert list(tmp_path.iterdir()) == []


# --- damage -------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def flipped_blocks(name):
    size = len(CONTENT[name])
    return [lambda d, at=at: flip(d / name, at) for at in sorted({*range(0, size, BLOCK), size - 1})]


def remanifest(directory: Path, change) -> None:
    listed = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(change(listed)))


DAMAGES = {
    **{f"flip-{name}-{i}": damage for name in CONTENT for i, damage in enumerate(flipped_blocks(name))},
    **{f"missing-{name}": lambda d, name=name: (d / name).unlink() for name in (*CONTENT, MANIFEST)},
    **{
        f"cut-{name}-{size}": lambda d, name=name, size=size: os.truncate(d / name, size)
        for name in (*CONTENT, MANIFEST)
        for size in (0, 1)
    },
    "cut-at-a-block": lambda d: os.truncate(d / "weights.bin", BLOCK),
    "longer": lambda d: (d / "weights.bin").write_bytes(CONTENT["weights.bin"] + b"\0"),
    "added": lambda d: (d / "extra.bin").write_bytes(b""),
    "added-below": lambda d: (d / "deep" / MANIFEST).write_bytes(b"{}"),
    "renamed": lambda d: (d / "config.json").rename(d / "Config.json"),
    "manifest-of-nothing": lambda d: (d / MANIFEST).write_text("{}"),
    "manifest-is-a-list": lambda d: (d / MANIFEST).write_text("[]"),
    "manifest-of-numbers": lambda d: remanifest(d, lambda listed: dict.fromkeys(listed, 1)),
    "manifest-of-null": lambda d: remanifest(d, lambda listed: dict.fromkeys(listed)),
    "manifest-without-one": lambda d: remanifest(d, lambda listed: {k: v for k, v in listed.items() if "deep" in k}),
    "manifest-not-text": lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_the_one_before_is_used(saved, damage, caplog):
    save_atomically(saved.with_name("step-00000004"), write)
    damaged = saved.with_name("step-00000006")
    save_atomically(damaged, write)
    damage(damaged)
    with pytest.raises(PrefloopError, match="step-00000006") as caught:
        verify(damaged)
    assert "\n" not in str(caught.value)
    assert newest_whole(saved.parent).name == "step-00000004"
    assert sorted(os.listdir(saved.parent)) == ["bad-step-00000006", "step-00000002", "step-00000004"]
    assert str(caught.value) in caplog.text  # nothing silent


def test_each_flipped_bit_of_a_manifest_is_found(tmp_path):
    saved = tmp_path / "small"
    save_atomically(saved, lambda directory: (directory / "config.json").write_bytes(b"{}"))
    text = (saved / MANIFEST).read_bytes()
    for position in range(len(text)):
        for bit in range(8):
            flip(saved / MANIFEST, position, bit)
            with pytest.raises(PrefloopError):
                verify(saved)
            (saved / MANIFEST).write_bytes(text)


def test_a_file_that_cannot_be_read_is_damage(saved, monkeypatch):
    def unreadable(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_sha256", unreadable)
    with pytest.raises(PrefloopError, match=r"file config.json cannot be read: Input/output error"):
        verify(saved)


def test_damaged_ones_never_take_each_others_names(saved):
    for _ in range(3):
        (saved / "config.json").unlink()
        assert newest_whole(saved.parent) is None
        save_atomically(saved, write)
    assert sorted(os.listdir(saved.parent)) == [f"bad-{saved.name}{n}" for n in ("", "-1", "-2")] + [saved.name]


def test_nothing_saved_yet(tmp_path):
    assert newest_whole(tmp_path / "none") is None
    assert newest_whole(tmp_path) is None


def test_a_place_that_cannot_be_written_needs_no_space(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PrefloopError, match=r"^cannot save .*: File exists; name a place that can be written$"):
        save_atomically(tmp_path / "file" / "new", lambda directory: None)


def test_of_two_that_save_at_once_the_second_is_told_so(tmp_path):
    target = tmp_path / "new"

    def slowly(directory: Path) -> None:
        (directory / "w.bin").write_bytes(b"second")
        target.mkdir()
        (target / "w.bin").write_bytes(b"first")

    with pytest.raises(PrefloopError, match=r"another process has just written it: name another place$"):
        save_atomically(target, slowly)
    assert (target / "w.bin").read_bytes() == b"first"
