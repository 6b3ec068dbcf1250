"""Models and data by name: a path here, or `org/name@revision` of a hub, pinned to its commit.

What a hub gives is kept in the local cache of the package huggingface_hub (`HF_HOME`); where no hub can be reached,
the cache is used, with a notice. `HF_ENDPOINT` names another hub, `HF_HUB_OFFLINE=1` asks none.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from prefloop.records import PrefloopError

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]

HUB_MISSING = "names of a hub need huggingface_hub: pip install 'prefloop[train]'"
HUB_SECONDS = 10.0
"""How long the hub may take to say that it is there."""

CLIENTS = ("httpx", "httpx2", "requests")
"""Packages whose errors say that the hub cannot be reached, whichever of them huggingface_hub uses."""

OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk may say without naming a file."""

REFUSED = (401, 403)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
PLACES: Mapping[Kind, str] = {"model": "directory", "dataset": "file"}
MAX_LISTED = 20
FIRST_FILES = [".gitattributes", "README.md", "config.json"]
"""Of a repository, so that the cache knows what its revision stands for."""

ADAPTER_CONFIG = "adapter_config.json"
CONFIGS = ("config.json", ADAPTER_CONFIG)
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
MODEL_FILES = [*SMALL_FILES, "*.safetensors"]
PICKLED = ["pytorch_model*.bin", "adapter_model.bin"]
OTHER_FORMATS = ["onnx/*", "openvino/*", "coreml/*", "original/*", "metal/*", "gguf/*", "consolidated*"]
"""Where repositories keep the same weights once more, for other programs."""

DATA_FILES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
NO_ROWS = re.compile(r"(^|/)(\.|dataset_infos?\.json$|dataset_dict\.json$|state\.json$|[^/]*config[^/]*\.json$)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./+-]+))?(?::(?P<path>.+))?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of a hub at a revision (empty: its main branch), and what of it is meant."""

    repo: str
    revision: str = ""
    path: str = ""

    def at(self, commit: str) -> str:
        """The name with the commit in place of the revision."""
        return f"{self.repo}@{commit}" + (f":{self.path}" if self.path else "")

    def __str__(self) -> str:
        return self.at(self.revision) if self.revision else self.repo + (f":{self.path}" if self.path else "")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows: where it lies, its name, and what it is called where another has that name."""

    path: Path
    name: str
    called: str


# --- names ------------------------------------------------------------------------------------------------------


def model_name(text: str) -> HubName | None:
    """The repository that a model's name means; None where it can only be a path."""
    found = _NAME.fullmatch(text)
    if found is None or found["path"] or Path(text).exists() or text.startswith("."):
        return None
    return HubName(found["repo"], found["revision"] or "")


def data_name(text: str) -> HubName | None:
    """The repository that data's name means: `org/name`, at most with a revision and a path; None for a path here."""
    found = _NAME.fullmatch(text)
    if found is None or "/" not in found["repo"] or Path(text).exists() or text.startswith("."):
        return None
    if not (found["revision"] or found["path"]) and text.endswith(DATA_FILES):
        return None
    return HubName(found["repo"], found["revision"] or "", (found["path"] or "").strip("/"))


# --- models -----------------------------------------------------------------------------------------------------


def pinned_model(name: str) -> str:
    """A model's name with the commit that its revision stands for now; a path as it is.

    Raises:
        PrefloopError: as `fetch_model`.
    """
    found = None if Path(name).exists() else model_name(name)
    return name if found is None else found.at(_pin(found, "model").commit)


def fetch_model(name: str, *, weights: bool = True) -> Path:
    """The directory of a model: its own, or where the cache keeps the repository's files.

    Without `weights` those are not fetched: the rest is enough to know the model's shape and tokenizer.

    Raises:
        PrefloopError: there is no such directory or repository, or it is not here and the hub cannot be reached.
    """
    if not name:
        raise PrefloopError("model '' cannot be loaded: its name is empty; name a directory or a hub id")
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise PrefloopError(
            f"model {name!r} cannot be loaded: it is a file; name a directory in Hugging Face's layout or a hub id"
        )
    found = model_name(name)
    if found is None:
        raise PrefloopError(f"model {name!r} cannot be loaded: there is no such directory")
    at = _pin(found, "model")
    directory = _download(found, "model", at, MODEL_FILES if weights else SMALL_FILES, OTHER_FORMATS)
    if weights and not any(directory.rglob("*.safetensors")):
        directory = _download(found, "model", at, [*MODEL_FILES, *PICKLED], OTHER_FORMATS)
    if not any((directory / config).is_file() for config in CONFIGS):
        raise PrefloopError(f"model {name!r} cannot be loaded: {found.repo} of the hub has no config.json")
    return directory


@contextmanager
def readable(what: str, expected: str = "") -> Iterator[None]:
    """Read the files of `what`; whatever a damaged one makes its reader raise becomes one line.

    Raises:
        PrefloopError: they cannot be read; `expected`, a sentence, ends it.
    """
    try:
        yield
    except (PrefloopError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error) and isinstance(error, RuntimeError):  # torch has no other type for it on a CPU
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if not isinstance(error, OSError | ValueError):
            why = " ".join(line.strip() for line in lines)[:300].rstrip(".")
            lines = [f"a file of it seems to be damaged: {type(error).__name__}: {why}."]
        raise PrefloopError(f"{what} cannot be loaded: {lines[0]} {expected}".rstrip()) from None


def is_adapter(name: str) -> bool:
    """Whether a model's name means an adapter; False, too, where it cannot be had, as loading it is going to say."""
    if Path(name).exists():
        return (Path(name) / ADAPTER_CONFIG).is_file()
    found = model_name(name)
    if found is None:
        return False
    try:
        return (_download(found, "model", _pin(found, "model"), [ADAPTER_CONFIG]) / ADAPTER_CONFIG).is_file()
    except PrefloopError:
        return False


# --- data -------------------------------------------------------------------------------------------------------


def data_files(name: str) -> list[DataFile]:
    """The files that a name of data means: the file of this path, or those of one split of a dataset's repository.

    Raises:
        PrefloopError: there is no such file or repository, it has no such files or those of several splits, or it is
            not here and the hub cannot be reached.
    """
    found = None if Path(name).exists() else data_name(name)
    if found is None:
        if not Path(name).exists():
            raise PrefloopError(f"there is no file {name}")
        return [DataFile(Path(name), Path(name).name, name)]
    return list(_fetched(found))


@lru_cache(maxsize=256)
def _fetched(name: HubName) -> tuple[DataFile, ...]:
    at = _pin(replace(name, path=""), "dataset")
    try:
        chosen = choose_files(str(name), _list(name, at), name.path)
    except PrefloopError:
        if not at.unreachable:
            raise
        raise _not_here(name, "dataset", at.unreachable) from None
    directory = _download(name, "dataset", at, [re.sub(r"([*?[])", r"[\1]", file) for file in chosen])
    called = [HubName(name.repo, path=file).at(at.commit) for file in chosen]
    return tuple(DataFile(directory / file, one, one) for file, one in zip(chosen, called, strict=True))


def choose_files(name: str, files: list[str], path: str) -> list[str]:
    """Of a dataset's files those of one split: all of them, or of `path`: a file, a split, a folder, or folder/split.

    The shards of a split, `train-00000-of-00002.parquet`, count as one.

    Raises:
        PrefloopError: there are none, or those of several splits, which are listed.
    """
    rows = [file for file in sorted(files) if file.endswith(DATA_FILES) and not NO_ROWS.search(file)]
    if path in files:
        return [path]
    chosen = [file for file in rows if not path or _is_of(file, path)]
    groups = sorted({_group(file) for file in chosen})
    if len(groups) == 1:
        return chosen
    if not chosen:
        there = f"it has {_listed(rows)}" if rows else f"it has no files that end in {', '.join(DATA_FILES)}"
        raise PrefloopError(f"data {name!r}: nothing of it is {path!r}; {there}" if path else f"data {name!r}: {there}")
    bare = name.removesuffix(f":{path}") if path else name
    raise PrefloopError(f"data {name!r} is ambiguous: name one, such as {bare}:{groups[0]}, of {_listed(chosen)}")


def _group(file: str) -> str:
    """A file's folder and split, without the number of its shard."""
    stem = next(file.removesuffix(ending) for ending in sorted(DATA_FILES, key=len)[::-1] if file.endswith(ending))
    return _SHARD.sub("", stem)


def _is_of(file: str, path: str) -> bool:
    group = _group(file)
    return path in (group, PurePosixPath(group).name) or group.endswith(f"/{path}") or file.startswith(f"{path}/")


def _listed(files: list[str]) -> str:
    more = f" and {len(files) - MAX_LISTED} more" if len(files) > MAX_LISTED else ""
    return ", ".join(files[:MAX_LISTED]) + more


# --- giving to a hub --------------------------------------------------------------------------------------------


def check_repository(repo: str, revision: str = "") -> None:
    """See that something may be given to a repository: the names of it and its branch are whole, and there is a token.

    Raises:
        PrefloopError: it is not; naming what to do.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise PrefloopError(f"repository {repo!r} should be OWNER/NAME of the hub")
    if revision and not re.fullmatch(r"[\w./+-]+", revision):
        raise PrefloopError(f"revision {revision!r} should be the name of a branch: letters, digits and ./+-_")
    if _hub().get_token() is None:
        raise PrefloopError(f"pushing to {repo} needs a token that may write: {LOG_IN}")


def upload(folder: Path, repo: str, *, private: bool, revision: str, message: str) -> str:
    """Give a folder's files to a model's repository, made where there is none; returns the address of the commit.

    Raises:
        PrefloopError: as `check_repository`; the hub refuses or cannot be reached, or the repository is there and
            public though it is to be private.
    """
    check_repository(repo, revision)
    api = _hub().HfApi()
    try:
        with _explained(HubName(repo, revision), "model"):
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.repo_info(repo, timeout=HUB_SECONDS).private:
                raise PrefloopError(
                    f"repository {repo} is there already and public: leave --private out, or name another"
                )
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            options = {"repo_id": repo, "revision": revision or None, "commit_message": message}
            return str(api.upload_folder(folder_path=folder, **options).commit_url)
    except _UnreachableError as reason:
        raise PrefloopError(f"nothing was pushed to {repo}: {reason}") from None


# --- the hub ----------------------------------------------------------------------------------------------------


class _UnreachableError(Exception):
    """The hub does not answer, or says that it cannot."""


def _hub() -> Any:
    try:
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise PrefloopError(HUB_MISSING) from None
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)  # what is not there is no news
    if not sys.stderr.isatty():
        disable_progress_bars()
    return huggingface_hub


class _Pin(NamedTuple):
    """The commit that a revision stands for, and why the hub could not be asked for it."""

    commit: str
    unreachable: str = ""


@lru_cache(maxsize=256)
def _pin(name: HubName, kind: Kind) -> _Pin:
    """What a name's revision stands for, asked once in each process."""
    if _COMMIT.fullmatch(name.revision):
        return _Pin(name.revision)
    hub = _hub()
    try:
        with _explained(name, kind):
            options: dict[str, Any] = {"revision": name.revision or None, "repo_type": kind}
            hub.HfApi().repo_info(name.repo, timeout=HUB_SECONDS, **options)  # else the cache is used without a word
            return _Pin(Path(hub.snapshot_download(name.repo, allow_patterns=FIRST_FILES, **options)).name)
    except _UnreachableError as reason:
        cached = _cached_commit(name, kind)
        if cached is None:
            raise _not_here(name, kind, str(reason)) from None
        log.warning(
            "the hub cannot be reached (%s): %s %s is taken from the local cache, commit %s", reason, kind, name, cached
        )
        return _Pin(cached, str(reason))


def _cached_commit(name: HubName, kind: Kind) -> str | None:
    """The commit that a revision stood for when it was last fetched."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type=kind)
    ref = folder / "refs" / (name.revision or constants.DEFAULT_REVISION)
    commit = ref.read_text().strip() if ref.is_file() else ""
    return commit if (folder / "snapshots" / commit).is_dir() and commit else None


def _list(name: HubName, at: _Pin) -> list[str]:
    """The files of a dataset's repository; of those in the cache where the hub cannot be reached."""
    try:
        if at.unreachable:
            raise _UnreachableError(at.unreachable)
        with _explained(name, "dataset"):
            return list(_hub().HfApi().list_repo_files(name.repo, revision=at.commit, repo_type="dataset"))
    except _UnreachableError as reason:
        directory = _download(name, "dataset", at._replace(unreachable=str(reason)), [""])
        return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]


def _download(name: HubName, kind: Kind, at: _Pin, patterns: list[str], without: list[str] | None = None) -> Path:
    """Fetch files of a repository into the cache, where they are not there yet; returns the directory of the commit."""
    options: dict[str, Any] = {"repo_type": kind, "allow_patterns": patterns, "ignore_patterns": without}
    options |= {"etag_timeout": HUB_SECONDS, "local_files_only": bool(at.unreachable)}
    try:
        with _explained(name, kind):
            return Path(_hub().snapshot_download(name.repo, revision=at.commit, **options))
    except _UnreachableError as reason:
        raise _not_here(name, kind, f"{at.unreachable} {reason}".strip()) from None


def _not_here(name: HubName, kind: Kind, reason: str) -> PrefloopError:
    what = f"{kind} {str(name)!r} cannot be loaded: there is no such {PLACES[kind]}"
    return PrefloopError(
        f"{what}, and the hub cannot be reached: {reason.rstrip('.')}. Name a mirror by HF_ENDPOINT, or fetch it "
        f"elsewhere with `hf download {name.repo} --repo-type {kind} --local-dir DIR` and give the path"
    )


@contextmanager
def _explained(name: HubName, kind: Kind) -> Iterator[None]:
    """Turn errors of the hub and the cache into one line, those of a hub out of reach into `_UnreachableError`."""
    from huggingface_hub import constants, errors

    what = f"{kind} {str(name)!r} cannot be loaded"
    try:
        yield
    except errors.GatedRepoError:
        raise PrefloopError(f"{what}: accept the conditions on its page, and {LOG_IN}") from None
    except errors.RepositoryNotFoundError:
        raise PrefloopError(
            f"{what}: there is no such {PLACES[kind]}, and no {kind} {name.repo} on the hub, or it is private: {LOG_IN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise PrefloopError(f"{what}: {name.repo} has no revision {name.revision!r}") from None
    except Exception as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_DISKS):
            where = error.filename or constants.HF_HUB_CACHE
            raise PrefloopError(
                f"{what}: {where}: {error.strerror}; the hub's files are kept in {constants.HF_HUB_CACHE}, and HF_HOME "
                "names another place"
            ) from None
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        refused = getattr(getattr(error, "response", None), "status_code", None) in REFUSED
        raise _UnreachableError(f"{reason.rstrip('.')}; {LOG_IN}" if refused else reason) from None
