"""A hub on loopback that this process asks in place of the real one, with a cache of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import logging as hub_logging

from fakes.hub import Hub, served
from prefloop import hub as names


@contextmanager
def hub_of(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served() as hub:
        ask_at(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage of its own that the fake does not have
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(names, "HUB_SECONDS", 2.0)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub_logging.set_verbosity_error()
        ask_again()
        yield hub
        ask_again()


def ask_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does in a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def ask_again() -> None:
    """Forget what names stood for: as a process of its own would not know it."""
    names._pin.cache_clear()
    names._fetched.cache_clear()
