"""The report as one HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere.

What models and tools wrote reaches the page only through autoescaping, and a content security policy in the page
forbids every request and every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop import __version__
from prefloop.records import JSONObject, PrefloopError
from prefloop.report import words
from prefloop.report.examples import NAMES, calibration, examples
from prefloop.report.figures import figures
from prefloop.report.record import BEFORE_LOOP, RunRecord, read_run, verified_rater
from prefloop.report.summary import agreement_with_people, attempts, final_rows, verdict
from prefloop.store import Store

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
SHORT = 8  # characters of an id that are shown; the whole one is in the tooltip


def write_report(store: Store, run_id: str, path: str | Path) -> Path:
    """Write the report of a run, finished or not, to `path`; returns the path.

    What the run has not done yet is named in the report instead of shown.

    Raises:
        PrefloopError: there is no such run, jinja2 or matplotlib is not installed, or the file cannot be written.
    """
    environment = _environment()
    record = read_run(store, run_id)
    html = environment.get_template("report.html.j2").render(_context(store, record))
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(html, encoding="utf-8")
    except OSError as error:
        raise PrefloopError(f"cannot write the report to {target}: {error.strerror}; choose another path") from error
    return target


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise PrefloopError("a report needs jinja2: pip install 'prefloop[report]'") from error
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        share=words.share_with_interval,
        number=words.number,
        seconds=words.seconds,
        title_of=words.title,
        unbroken=lambda text: str(text).replace(", ", ",\u00a0"),  # an interval stays on one line
        short=lambda text: str(text)[:SHORT],
    )
    return environment


def _context(store: Store, record: RunRecord) -> dict[str, Any]:
    rater_id = verified_rater(store, record.run_id)
    judged = calibration(store, record, rater_id)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    stages = record.seconds_by_stage()
    return {
        "agreement": agreement_with_people(store, record),
        "attempts": {turn.number: attempts(turn.train) for turn in record.iterations},
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.created_at)),
        "end": (record.end_evaluation.get("sampled") or {}),
        "examples": examples(store, record, rater_id),
        "figures": figures(record, judged),
        "kind_names": NAMES,
        "missing": record.missing(),
        "not_judged": _not_judged(record),
        "policies": _policies(record),
        "record": record,
        "rows": final_rows(record),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "settings": words.toml_text(record.settings),
        "stages": stages,
        "statuses": _statuses(record),
        "start": (record.start_evaluation.get("sampled") or {}),
        "style": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "verdict": verdict(record),
        "version": __version__,
        "versions": record.before.get("start", {}).get("versions", {}),
        "wall": record.finish.get("wall_s", sum(stages.values()) or None),
    }


def _statuses(record: RunRecord) -> Counter[str]:
    """How many judgements of the whole run ended in each status."""
    return sum((Counter(turn.judge.get("statuses", {})) for turn in record.iterations), Counter())


def _not_judged(record: RunRecord) -> Counter[str]:
    """How many trajectories of the whole run were no case for the judge, by reason."""
    return sum((Counter(turn.judge.get("left_out", {})) for turn in record.iterations), Counter())


def _policies(record: RunRecord) -> list[JSONObject]:
    """The lineage of the policies: each iteration's checkpoint, what it came from and what it was trained on."""
    before = [checkpoint for checkpoint in record.checkpoints.values() if checkpoint.iteration == BEFORE_LOOP]
    first = [
        {"stage": "before the loop", "train": {"checkpoint_id": checkpoint.id}, "curate": {}} for checkpoint in before
    ]
    turns = [{"stage": f"iteration {t.number}", "train": t.train, "curate": t.curate} for t in record.iterations]
    return [_policy(record, turn) for turn in [*first, *turns]]


def _policy(record: RunRecord, turn: JSONObject) -> JSONObject:
    checkpoint_id = turn["train"].get("checkpoint_id", "")
    checkpoint = record.checkpoints.get(checkpoint_id)
    trained_on = checkpoint.dataset_id if checkpoint and not turn["train"].get("rolled_back") else ""
    dataset_id = turn["train"].get("dataset_id") or turn["curate"].get("dataset_id") or trained_on
    return {
        "stage": turn["stage"],
        "checkpoint_id": checkpoint_id,
        "parent_id": checkpoint.parent_id if checkpoint else "",
        "manifest_hash": checkpoint.manifest_hash if checkpoint else "",
        "algorithm": checkpoint.algorithm if checkpoint else turn["train"].get("algorithm", ""),
        "dataset_id": dataset_id,
        "num_members": record.num_members.get(dataset_id),
        "rolled_back": bool(turn["train"].get("rolled_back")),
    }
