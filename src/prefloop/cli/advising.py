"""`prefloop advise`: which objective fits what the store holds."""

from __future__ import annotations

from rich.table import Table

from prefloop.cli.plumbing import StoreOption, console, open_store


def advise(*, store: StoreOption = None) -> None:
    """Say which objective fits what the store holds, with the reason."""
    from prefloop.stages.advising import advise as advice_on
    from prefloop.stages.advising import holdings

    with open_store(store) as opened:
        found = advice_on(holdings(opened))
    table = Table("objective", "because", "command", show_lines=True)
    for advice in found:
        table.add_row(advice.objective, advice.reason, advice.command)
    console.print(table, highlight=False)
