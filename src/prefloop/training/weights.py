"""Which weights a model directory holds, as a hash."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from prefloop.hub import fetch_model
from prefloop.records import PrefloopError, content_hash
from prefloop.training.checkpoint import MANIFEST

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin")


def weights_hash(name: str) -> str:
    """The hash of a model's weights and configuration, of a directory or a hub id.

    Equal for copies; an adapter counts with the model that it changes. What a checkpoint's manifest lists is not read
    again: who loads it verifies it.

    Raises:
        PrefloopError: there are no weights; as `fetch_model`.
    """
    directory = fetch_model(name)
    files = sorted({path for pattern in WEIGHTS for path in directory.glob(pattern)})
    if not files:
        raise PrefloopError(f"{name} holds no weights (*.safetensors): name a model's directory or a hub id")
    configurations = [path for path in (directory / CONFIG, directory / ADAPTER_CONFIG) if path.is_file()]
    listed = _listed(directory)
    digests = {path.name: listed.get(path.name) or _sha256(path) for path in [*files, *configurations]}
    return content_hash("weights", digests, _base_hash(directory))


def loaded_hash(weights: str, quantization: str | None) -> str:
    """The hash of weights as they are in memory: those of a few bits give other log-probs."""
    return content_hash("quantised", weights, quantization) if quantization else weights


def _base_hash(directory: Path) -> str:
    """The hash of the model that an adapter changes; empty where there is no adapter."""
    adapter = directory / ADAPTER_CONFIG
    if not adapter.is_file():
        return ""
    config = json.loads(adapter.read_text())
    base = str(config["base_model_name_or_path"])
    beside = directory / base  # a reward model's own, relative to the adapter
    if beside.is_dir() or Path(base).is_dir() or not config.get("revision"):
        return weights_hash(str(beside) if beside.is_dir() else base)
    return weights_hash(f"{base}@{config['revision']}")


def _listed(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file as the manifest lists it; empty without one."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return {}
    return {str(name): str(digest) for name, (_, digest) in json.loads(manifest.read_text()).items()}


def _sha256(path: Path) -> str:
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed_ns: int) -> str:
    """The SHA-256 of a file, computed once for each of its states."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
