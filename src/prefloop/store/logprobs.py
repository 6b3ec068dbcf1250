"""Log-probs of tokens under a model, kept by the hash of its weights, the hash of the tokens, and the precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import select

from prefloop.store import schema
from prefloop.store.store import Store

_table = schema.logprob

IN_CHUNK = 500  # hashes in one query: below SQLite's limit of bound parameters


def read_logprobs(store: Store, model_hash: str, dtype: str, path_hashes: Sequence[str]) -> dict[str, bytes]:
    """What is kept of these paths, by hash: little-endian floats."""
    found: dict[str, bytes] = {}
    with store.reading() as connection:
        for chunk in _chunks(path_hashes):
            query = select(_table.c.path_hash, _table.c.logprob).where(
                _table.c.model_hash == model_hash, _table.c.dtype == dtype, _table.c.path_hash.in_(chunk)
            )
            found |= dict(connection.execute(query).tuples().all())
    return found


def add_logprobs(store: Store, model_hash: str, dtype: str, logprobs: Mapping[str, bytes]) -> None:
    """Keep log-probs by the hash of their path, all in one commit; what is kept already stays as it is."""
    rows = ({"path_hash": path_hash, "logprob": logprob} for path_hash, logprob in logprobs.items())
    store.insert(_table, ({"model_hash": model_hash, "dtype": dtype, **row} for row in rows))


def _chunks(hashes: Sequence[str]) -> Iterator[Sequence[str]]:
    return (hashes[start : start + IN_CHUNK] for start in range(0, len(hashes), IN_CHUNK))
