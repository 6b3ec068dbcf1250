"""The ledger of paid judge calls.

A call is written down as *sent*, and committed, before the request leaves, and as *answered* with the raw reply
once it is there. The key is the hash of everything the server sees, and the replicate that keeps repeated samples
apart; so a reply is paid once, whichever parser reads it and however often the run is killed.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select, update

from prefloop.records import Status
from prefloop.store import schema
from prefloop.store.store import Store

_calls = schema.judge_call


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered: the raw text, the model it says it is, and what it cost (US dollars)."""

    status: Status
    text: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


def recorded_reply(store: Store, request_hash: str, replicate: int) -> Reply | None:
    """The good reply that was recorded for this call, or None when it has to be made."""
    query = (
        select(_calls)
        .where(_calls.c.request_hash == request_hash, _calls.c.replicate == replicate)
        .where(_calls.c.state == "answered", _calls.c.status == Status.OK.value)
        .order_by(_calls.c.attempt)
    )
    with store.reading() as connection:
        row = connection.execute(query).mappings().first()
    if row is None:
        return None
    return Reply(
        Status(row["status"]), row["reply"], row["model"], row["input_tokens"], row["output_tokens"], row["cost"]
    )


def record_sent(
    store: Store, request_hash: str, replicate: int, *, reserved: float = 0.0, limit: float | None = None
) -> int | None:
    """Write down that a call is about to be made; returns the number of this attempt.

    `reserved` US dollars count as spent until the reply says what the call cost. Where they would take the total
    of the store above `limit`, nothing is written and None is returned: the call must not be made.
    """
    with store.transaction() as connection:
        if limit is not None and total_cost(store) + reserved > limit:
            return None
        same = (_calls.c.request_hash == request_hash) & (_calls.c.replicate == replicate)
        attempt: int = connection.execute(select(func.count()).select_from(_calls).where(same)).scalar_one()
        row = {"request_hash": request_hash, "replicate": replicate, "attempt": attempt}
        connection.execute(_calls.insert().values(**row, state="sent", cost=reserved, created_at=store.clock()))
    return attempt


def record_reply(store: Store, request_hash: str, replicate: int, attempt: int, reply: Reply) -> None:
    """Write down what came back, a failure too."""
    with store.transaction() as connection:
        connection.execute(
            update(_calls)
            .where(_calls.c.request_hash == request_hash, _calls.c.replicate == replicate)
            .where(_calls.c.attempt == attempt)
            .values(
                state="answered",
                status=reply.status.value,
                reply=reply.text,
                model=reply.model,
                input_tokens=reply.input_tokens,
                output_tokens=reply.output_tokens,
                cost=reply.cost,
            )
        )


def total_cost(store: Store) -> float:
    """US dollars spent on all recorded calls, with what is reserved for those that are not answered."""
    with store.reading() as connection:
        return float(connection.execute(select(func.coalesce(func.sum(_calls.c.cost), 0.0))).scalar_one())


def mean_tokens(store: Store) -> tuple[float, float] | None:
    """Tokens in and out of an answered call on average; None where no server has counted any."""
    query = select(func.avg(_calls.c.input_tokens), func.avg(_calls.c.output_tokens)).where(_calls.c.input_tokens > 0)
    with store.reading() as connection:
        row = connection.execute(query).one()
    return None if row[0] is None else (float(row[0]), float(row[1]))
