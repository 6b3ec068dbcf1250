"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefloop.records import PrefloopError


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well, synced to disk.

    Raises:
        PrefloopError: the file exists and `force` is off, or it cannot be written.
    """
    if path.is_dir():
        raise PrefloopError(f"{path} is a directory: name a file")
    if path.exists() and not force:
        raise PrefloopError(f"{path} exists: use --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise PrefloopError(f"{path} cannot be written: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        _put(temporary, path, force)
        _sync(path.parent)
    except OSError as error:
        raise PrefloopError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _put(temporary: Path, path: Path, force: bool) -> None:
    os.chmod(temporary, 0o666 & ~_umask())
    if force:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, it fails where somebody made the file meanwhile
    except FileExistsError:
        raise PrefloopError(f"{path} exists: use --force to replace it") from None
    except OSError:
        os.replace(temporary, path)  # a file system without hard links


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
