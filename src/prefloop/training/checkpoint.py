"""Saving as one atomic unit: a directory is there whole and verified, or not at all.

Protocol: write into a temporary directory beside the target; write a manifest of every file's size and SHA-256;
fsync every file and the directory; rename; fsync the parent. A reader verifies the manifest before it trusts a
byte, sets a damaged directory aside and falls back to the one before. Nothing is ever overwritten in place and
nothing is unpickled: safetensors and JSON only.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from prefloop.records import PrefloopError

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
DISK_ERROR = "(os error "  # how libraries written in Rust, which raise no OSError, end their messages


def save_atomically(target: Path, write: Callable[[Path], None]) -> str:
    """Let `write` fill a directory, then publish it as `target`; returns the SHA-256 of its manifest.

    A target that is there already, whole, is left as it is (its content is a function of its name); a damaged one
    is set aside and written anew. Only one process at a time may save under a name.

    Raises:
        PrefloopError: the disk is full or not writable; the target is then not there, and nothing else changed.
    """
    try:
        if target.exists() and (saved := _whole(target)) is not None:
            _fsync(target.parent)  # who was killed may not have come to it
            return saved
        return _publish(target, write)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or f"{DISK_ERROR}{errno.ENOSPC})" in str(error)
        advice = "free space and run again" if full else "name a place that can be written"
        if error.errno == errno.ENOTEMPTY:
            advice = "another process has just written it: name another place"
        raise PrefloopError(f"cannot save {target}: {error.strerror or error}; {advice}") from error


def _publish(target: Path, write: Callable[[Path], None]) -> str:
    _make_directories(target.parent)
    for leftover in target.parent.glob(f".tmp-{glob.escape(target.name)}-*"):
        shutil.rmtree(leftover)
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        _fill(temporary, write)
        manifest_hash = _write_manifest(temporary)
        for path in [*_files(temporary), *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _fsync(path)
        temporary.rename(target)
        try:
            _fsync(target.parent)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)  # a later fsync could succeed without the rename on disk
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest_hash


def _fill(directory: Path, write: Callable[[Path], None]) -> None:
    try:
        write(directory)
    except Exception as error:
        if isinstance(error, OSError | PrefloopError) or DISK_ERROR not in str(error):
            raise
        raise OSError(str(error)) from error


def _make_directories(directory: Path) -> None:
    """Make a directory and those above it, each of them durable."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _fsync(path.parent)


def verify(directory: Path) -> str:
    """Check every file of a saved directory against its manifest; returns the manifest's SHA-256.

    Raises:
        PrefloopError: it is not there; naming the first file that is missing, added, cut short, changed or unreadable.
    """
    if not directory.is_dir():
        raise PrefloopError(
            f"there is no checkpoint at {directory}: a relative path counts from where its run was started"
        )
    try:
        text = (directory / MANIFEST).read_bytes()
        listed = {str(name): (size, digest) for name, (size, digest) in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise PrefloopError(f"{directory} has no readable {MANIFEST}: it was not saved whole") from None
    present = {str(path.relative_to(directory)) for path in _files(directory)} - {MANIFEST}
    if present != set(listed):
        odd = sorted(present ^ set(listed))[0]
        raise PrefloopError(f"{directory}: file {odd} is {'not listed' if odd in present else 'missing'}")
    for name, (size, digest) in listed.items():
        path = directory / name
        try:
            whole = path.stat().st_size == size and _sha256(path) == digest
        except OSError as error:
            raise PrefloopError(f"{directory}: file {name} cannot be read: {error.strerror}") from None
        if not whole:
            raise PrefloopError(f"{directory}: file {name} is damaged")
    return hashlib.sha256(text).hexdigest()


def newest_whole(parent: Path) -> Path | None:
    """The last directory by name that verifies; damaged ones are renamed to `bad-…`, leftovers removed."""
    if not parent.is_dir():
        return None
    for leftover in parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    candidates = (path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("bad-"))
    return next((path for path in sorted(candidates, reverse=True) if _whole(path) is not None), None)


def _whole(directory: Path) -> str | None:
    """The hash of a directory's manifest; None where it is damaged, and set aside."""
    try:
        return verify(directory)
    except PrefloopError as error:
        aside = _free_name(directory)
        log.warning("%s; it is set aside as %s", error, aside.name)
        directory.rename(aside)
        return None


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"bad-{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(1, 1000))))
    return next(name for name in names if not name.exists())


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _write_manifest(directory: Path) -> str:
    listed = {str(path.relative_to(directory)): [path.stat().st_size, _sha256(path)] for path in _files(directory)}
    text = json.dumps(listed, indent=1, sort_keys=True).encode()
    (directory / MANIFEST).write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
