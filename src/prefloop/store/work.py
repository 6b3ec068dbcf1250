"""Work items with leases: who may do what until when, and what is done.

An item is leased to one owner until a time; a lease that ran out may be taken by another, and the fence number
tells the two apart, so that a late finisher cannot overwrite the newer owner's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select, update

from prefloop.store import schema
from prefloop.store.store import Store

_work = schema.work


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to do one item of work until `until` (seconds since the epoch)."""

    kind: str
    key: str
    owner: str
    fence: int
    until: float


def claim(store: Store, kind: str, keys: Sequence[str], owner: str, seconds: float) -> Lease | None:
    """Lease the first of `keys` that is neither done nor leased to somebody else; None when there is none.

    An owner's own running lease is given again.
    """
    now = store.clock()
    with store.transaction() as connection:
        store.insert(schema.work, [_open(kind, key) for key in keys])
        free = or_(_work.c.state == "open", _work.c.lease_until <= now, _work.c.owner == owner)
        query = select(_work.c.key, _work.c.fence).where(_work.c.kind == kind, _work.c.state != "done", free)
        available = {row.key: row.fence for row in connection.execute(query)}
        key = next((key for key in keys if key in available), None)
        if key is None:
            return None
        lease = Lease(kind, key, owner, available[key] + 1, now + seconds)
        connection.execute(
            update(_work)
            .where(_work.c.kind == kind, _work.c.key == key)
            .values(state="leased", owner=owner, fence=lease.fence, lease_until=lease.until)
        )
    return lease


def finish(store: Store, lease: Lease, *, done: bool = True) -> bool:
    """Mark leased work as done (or give it back); False when the lease was lost to another owner."""
    with store.transaction() as connection:
        statement = (
            update(_work)
            .where(_work.c.kind == lease.kind, _work.c.key == lease.key, _work.c.fence == lease.fence)
            .where(_work.c.state == "leased")
            .values(state="done" if done else "open", lease_until=0.0)
        )
        return connection.execute(statement).rowcount == 1


def _open(kind: str, key: str) -> dict[str, object]:
    return {"kind": kind, "key": key, "state": "open", "owner": "", "fence": 0, "lease_until": 0.0}
