"""Where everything rests: one store for all records of all runs."""

from prefloop.store.store import Store

__all__ = ["Store"]
