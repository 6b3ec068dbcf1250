"""The store: bulk import of trajectories with lineage, and the best of each task over a million judgements.

* import: a JSON Lines file of trajectories of 1 KB (a prompt and a completion), each with a judgement, through
  `prefloop.formats.import_file` into a new store on disk: rows read, checked, hashed and committed.
* topk: `Store.top_k`, the best 4 of each of 125,000 tasks over 8 judgements each.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sqlalchemy import text

from _common import Measured, Options, Timing, parse_options, run_cells, versions
from prefloop.formats.importing import import_file
from prefloop.records import Rater, RaterKind
from prefloop.store import Store
from prefloop.store.database import journal_mode

WORDS = (
    "flight",
    "hotel",
    "search",
    "book",
    "price",
    "direct",
    "cheap",
    "window",
    "aisle",
    "refund",
    "baggage",
    "gate",
)
GROUP = 8
JUDGE = Rater(RaterKind.JUDGE, "benchmark")


def import_cell(options: Options) -> Measured:
    num = 5_000 if options.quick else 100_000
    timing = Timing()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("".join(_rows(num, options.seed)))
        for repeat in range(1 if options.quick else 3):
            with Store(str(Path(folder, f"{repeat}.db"))) as store:
                cpu, wall = time.process_time(), time.perf_counter()
                report = import_file(store, path)
                timing.cpu.append(time.process_time() - cpu)
                timing.wall.append(time.perf_counter() - wall)
                counts = store.counts()
            if not report.num_trajectories == counts["trajectory"] == counts["judgement"] == num:
                raise SystemExit(f"imported {counts}, not {num} trajectories with a judgement each")
        size = path.stat().st_size
    row = {"what": f"{num:,} trajectories, {size / num:.0f} bytes each", **_times(timing)}
    row["per second"] = f"{num / timing.median_wall:,.0f}"
    return Measured({"import_per_s": num / timing.median_wall}, [row])


def _rows(num: int, seed: int) -> Iterator[str]:
    """Rows of TRL's unpaired format: a prompt, a completion and a label, about 1 KB."""
    draw = np.random.default_rng(seed)
    for start in range(0, num, GROUP):
        prompt = f"Task {start // GROUP}: " + " ".join(draw.choice(WORDS, 10))
        for i in range(start, min(start + GROUP, num)):
            completion = f"{i} " + " ".join(draw.choice(WORDS, 138))
            yield json.dumps({"prompt": prompt, "completion": completion, "label": bool(i % 3)}) + "\n"


def topk_cell(options: Options) -> Measured:
    num_tasks = 5_000 if options.quick else 125_000
    timing = Timing()
    with tempfile.TemporaryDirectory() as folder, Store(str(Path(folder, "store.db"))) as store:
        _fill(store, num_tasks, options.seed)
        for _ in range(1 if options.quick else 5):
            cpu, wall = time.process_time(), time.perf_counter()
            best = store.top_k(JUDGE.id, GROUP // 2)
            timing.cpu.append(time.process_time() - cpu)
            timing.wall.append(time.perf_counter() - wall)
        if len(best) != num_tasks * GROUP // 2:
            raise SystemExit(f"{len(best)} rows came back, not {num_tasks * GROUP // 2}")
    row = {
        "what": f"best {GROUP // 2} of each of {num_tasks:,} tasks, {num_tasks * GROUP:,} judgements",
        **_times(timing),
    }
    return Measured({} if options.quick else {"topk_1m_s": timing.median_wall}, [row])


def _fill(store: Store, num_tasks: int, seed: int) -> None:
    """Tasks, trajectories and judgements, made inside the database: only their number and spread matter here."""
    store.add_raters([JUDGE])
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :num)"
    # A multiplicative hash spreads the ids as real ones, which are hashes, are spread.
    spread = "printf('%016x%016x', (i * 2654435761 + :seed) & 4294967295, i)"
    task = f"{spread.replace('i)', f'i / {GROUP})').replace('(i *', f'(i / {GROUP} *')}"
    statements = {
        f"INSERT INTO task {numbers} SELECT {spread}, 'e', '{{}}', i, '[]', '[]', 'train', '' FROM n": num_tasks,
        f"""INSERT INTO trajectory (id, task_id, iteration, sample, seed, author_kind, author, ended, messages,
            num_prompt_messages, group_seeded, extra, created_at) {numbers}
            SELECT {spread}, {task}, 0, i, 0, 'import', '', 'done', '[]', 1, 1, '{{}}', 0 FROM n""": num_tasks * GROUP,
        f"""INSERT INTO judgement (id, trajectory_id, rater_id, replicate, status, value, score, criteria, rationale,
            request_hash, cost, created_at) {numbers}
            SELECT {spread}, {spread}, '{JUDGE.id}', 0, 'ok', 0, ((i * 40503) % 1001) / 1000.0, '{{}}', '', '', 0, 0
            FROM n""": num_tasks * GROUP,
    }  # fmt: skip
    with store.transaction() as connection:
        for statement, num in statements.items():
            connection.execute(text(statement), {"num": num, "seed": seed})


def _times(timing: Timing) -> dict[str, str]:
    return {"wall s": timing.text(timing.wall), "CPU s": timing.text(timing.cpu)}


def main() -> None:
    options = parse_options(__doc__)
    caption = f"{versions('sqlalchemy')}, SQLite {sqlite3.sqlite_version}, journal mode {journal_mode()}"
    run_cells("store", {"import": import_cell, "topk": topk_cell}, options, caption)


if __name__ == "__main__":
    main()
