"""Saving as one atomic unit: a directory is there whole and verified, or not at all.

Protocol: write into a temporary directory beside the target; write a manifest of every file's size and SHA-256;
fsync every file and the directory; rename; fsync the parent. A reader verifies the manifest before it trusts a
byte, sets a damaged directory aside and falls back to the one before. Nothing is ever overwritten in place and
nothing is unpickled: safetensors and JSON only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from prefloop.records import PrefloopError

MANIFEST = "MANIFEST.json"


def save_atomically(target: Path, write: Callable[[Path], None]) -> str:
    """Let `write` fill a directory, then publish it as `target`; returns the SHA-256 of its manifest.

    A target that is there already, whole, is left as it is (its content is a function of its name).

    Raises:
        PrefloopError: the disk is full or not writable; the target is then not there, and nothing else changed.
    """
    if target.exists():
        return verify(target)
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=False)
        write(temporary)
        manifest_hash = _write_manifest(temporary)
        for path in [*_files(temporary), *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _fsync(path)
        temporary.rename(target)
        _fsync(target.parent)
    except OSError as error:
        raise PrefloopError(f"cannot save {target}: {error.strerror or error}; free space and run again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest_hash


def verify(directory: Path) -> str:
    """Check every file of a saved directory against its manifest; returns the manifest's SHA-256.

    Raises:
        PrefloopError: naming the first file that is missing, added, cut short or changed.
    """
    try:
        text = (directory / MANIFEST).read_bytes()
        listed: dict[str, list[object]] = json.loads(text)
    except (OSError, ValueError):
        raise PrefloopError(f"{directory} has no readable {MANIFEST}: it was not saved whole") from None
    present = {str(path.relative_to(directory)) for path in _files(directory)} - {MANIFEST}
    if present != set(listed):
        odd = sorted(present ^ set(listed))[0]
        raise PrefloopError(f"{directory}: file {odd} is {'not listed' if odd in present else 'missing'}")
    for name, (size, digest) in listed.items():
        path = directory / name
        if path.stat().st_size != size or _sha256(path) != digest:
            raise PrefloopError(f"{directory}: file {name} is damaged")
    return hashlib.sha256(text).hexdigest()


def newest_whole(parent: Path) -> Path | None:
    """The last directory by name that verifies; damaged ones are renamed to `bad-…`, leftovers removed."""
    if not parent.is_dir():
        return None
    for leftover in parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    candidates = (path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("bad-"))
    for path in sorted(candidates, reverse=True):
        try:
            verify(path)
        except PrefloopError:
            path.rename(_free_name(path))
        else:
            return path
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
