"""The final table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from prefloop.report import words
from prefloop.report.record import read_run
from prefloop.report.summary import Row, final_rows, verdict
from prefloop.store import Store

MAIN_ROWS = ("Success, sampled", "Success, greedy", "KL from start, nats a trajectory", "Turns", "Invented ids")


def final_table(store: Store, run_id: str) -> Table:
    """Success before and after with 95 % intervals, KL, turns, invented ids, and wall time per stage.

    What the run has not measured (yet) shows as a dash.

    Raises:
        PrefloopError: there is no such run.
    """
    record = read_run(store, run_id)
    table = Table(title=Text(record.name or run_id, style="bold"), caption=Text(verdict(record).headline))
    table.add_column("")
    table.add_column("start", justify="right")
    table.add_column("end", justify="right")
    for row in final_rows(record):
        if row.name in MAIN_ROWS:
            table.add_row(row.name, row.start, Text(row.end, style=_style(row)))
    table.add_section()
    stages = record.seconds_by_stage()
    for stage, seconds in stages.items():
        table.add_row(f"Time, {words.title(stage)}", "", words.seconds(seconds))
    table.add_row("Time, all", "", words.seconds(record.finish.get("wall_s", sum(stages.values()))), style="bold")
    return table


def _style(row: Row) -> str:
    return {True: "bold green", False: "bold red", None: ""}[row.better]
