"""The findings of a run in words and rows, for the page and the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prefloop.feedback.votes import judge_agreement
from prefloop.records import JSONObject
from prefloop.report import words
from prefloop.report.record import RunRecord
from prefloop.store import Store


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the final table; `better` says which way it moved with 95 % confidence, None where that is open."""

    name: str
    start: str
    end: str
    note: str = ""
    better: bool | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The headline and what follows from it. `tone` is good, bad or open."""

    headline: str
    tone: str
    details: tuple[str, ...]


def verdict(record: RunRecord) -> Verdict:
    """What the run achieved, in plain words with intervals; says so when it cannot be said yet."""
    start, end = _success(record.start_evaluation), _success(record.end_evaluation)
    if skipped := record.start_evaluation.get("skipped"):
        return Verdict(_elsewhere_headline(record, skipped), "open", _details(record))
    if not start or not end:
        judged = record.start_evaluation and not start
        headline = _judged_headline(record) if judged else _unfinished_headline(start, record)
        return Verdict(headline, "open", _details(record))
    moved = _direction(start, end, record.finish.get("paired"))
    values = f"{words.share_with_interval(start)} to {words.share_with_interval(end)}"
    tasks = f"{end['n']:,} held-out tasks"
    if moved == "same":
        return Verdict(f"Success on {tasks} did not change measurably: {values}.", "open", _details(record))
    tone = "good" if moved == "rose" else "bad"
    return Verdict(f"Success on {tasks} {moved} from {values}.", tone, _details(record))


def _unfinished_headline(start: Mapping[str, Any], record: RunRecord) -> str:
    if not start:
        return "There is no evaluation yet, so nothing can be said about success."
    latest = [success for updates, success in record.successes() if updates]
    if not latest:
        return f"The start policy succeeds on {words.share_with_interval(start)} of {start['n']} tasks; no update yet."
    so_far = f"{words.share_with_interval(latest[-1])} on {latest[-1]['n']} guard tasks"
    return f"Not finished: the start policy succeeds on {words.share_with_interval(start)}, the latest on {so_far}."


def _elsewhere_headline(record: RunRecord, skipped: str) -> str:
    """Where agents play elsewhere their own episodes say something, but of other tasks each time."""
    said = f"Nothing was evaluated here: {skipped}."
    shares = [turn.judge["success"] for turn in record.iterations if turn.judge.get("success")]
    if not shares:
        return said
    first, last = (words.share_with_interval(share) for share in (shares[0], shares[-1]))
    return f"{said} Of its recorded episodes {first} succeeded in the first iteration and {last} in the latest."


def _judged_headline(record: RunRecord) -> str:
    """Where the environment verifies nothing there is only the judge, whom the policy was trained to please."""
    before, after = (
        _sampled(detail).get("mean_judge_score") for detail in (record.start_evaluation, record.end_evaluation)
    )
    if before is None or after is None:
        return "Nothing is verified here, so nothing can be said about success yet."
    scores = f"the training judge's mean score went from {words.number(before)} to {words.number(after)}"
    return f"Nothing is verified here; {scores}, which alone does not show that the policy is better."


def _direction(start: Mapping[str, Any], end: Mapping[str, Any], paired: Mapping[str, Any] | None) -> str:
    """Whether success rose, fell or stayed the same, with 95 % confidence.

    By the paired comparison (both its interval and its exact test must say so), else by intervals that do not meet.
    """
    if paired:
        difference = paired["difference"]
        low, high = (difference["low"], difference["high"]) if paired["p_value"] < 0.05 else (0.0, 0.0)
    else:
        low, high = end["low"] - start["high"], end["high"] - start["low"]
    return "rose" if low > 0 else "fell" if high < 0 else "same"


def _details(record: RunRecord) -> tuple[str, ...]:
    found = [_ungraded_words(record), _paired_words(record.finish.get("paired"))]
    found += [_kl_words(record), _rollback_words(record)]
    return tuple(text for text in found if text)


def _ungraded_words(record: RunRecord) -> str:
    """Success is of graded episodes alone: agents that crash must not go unnoticed."""
    both = (("start", record.start_evaluation), ("end", record.end_evaluation))
    found = [f"{_not_graded(evaluation)} ({which} policy)" for which, evaluation in both if _not_graded(evaluation)]
    return f"Success is of graded episodes alone: {'; '.join(found)}." if found else ""


def _not_graded(evaluation: JSONObject, how: str = "sampled") -> str:
    if not (success := _success(evaluation, how)):
        return ""
    num = int((evaluation.get(how) or {}).get("num_unverified") or 0)
    return words.not_graded(num, num + success["n"])


def _paired_words(paired: Mapping[str, Any] | None) -> str:
    if not paired:
        return ""
    counts = f"{paired['better']:,} won, {paired['worse']:,} lost, {paired['same']:,} unchanged"
    difference = words.points_with_interval(paired["difference"])
    return f"Task by task, on the same seeds: {counts}; {difference}, {words.p_value(paired['p_value'])}."


def _kl_words(record: RunRecord) -> str:
    kl = _sampled(record.end_evaluation).get("kl_per_trajectory")
    return "" if kl is None else f"The end policy is {words.number(kl)} nats a trajectory away from the start policy."


def _rollback_words(record: RunRecord) -> str:
    rolled_back = [str(turn.number) for turn in record.iterations if turn.train.get("rolled_back")]
    refused = sum(not attempt["accepted"] for turn in record.iterations for attempt in attempts(turn.train))
    if not refused and not rolled_back:
        return ""
    updates = "1 update, which was" if refused == 1 else f"{refused} updates, which were"
    kept = f"; iteration {', '.join(rolled_back)} ended without a new policy" if rolled_back else ""
    return f"The guards refused {updates} rolled back{kept}."


def attempts(train: JSONObject) -> list[JSONObject]:
    """The attempts at an update, in order."""
    return list(train.get("attempts") or [])


def final_rows(record: RunRecord) -> list[Row]:
    """The final table: success, KL, turns, mistakes; start against end."""
    start, end = record.start_evaluation, record.end_evaluation
    rows = [
        _success_row("Success, sampled", start, end, "sampled", record.finish.get("paired")),
        _success_row("Success, greedy", start, end, "greedy"),
    ]
    if num := (end.get("best_of") or {}).get("n"):
        rows.append(_success_row(f"Success, best of {num} by the judge", start, end, "best_of"))
    rows += [_kl_row("KL from start, nats a trajectory", end, "kl_per_trajectory")]
    rows += [_kl_row("KL from start, nats a token", end, "kl_per_token")]
    before, after = _metrics(start), _metrics(end)
    first = [name for name in ("turns", "invented_ids") if name in before or name in after]
    others = sorted((set(before) | set(after)) - set(first))
    means = [(name, words.number(before.get(name)), words.number(after.get(name))) for name in (*first, *others)]
    return rows + [Row(words.title(name), start_mean, end_mean) for name, start_mean, end_mean in means]


def _sampled(evaluation: JSONObject) -> JSONObject:
    return dict(evaluation.get("sampled") or {})


def _success(evaluation: JSONObject, how: str = "sampled") -> JSONObject:
    return dict((evaluation.get(how) or {}).get("success") or {})


def _metrics(evaluation: JSONObject) -> JSONObject:
    return dict(_sampled(evaluation).get("metrics") or {})


def _success_row(name: str, start: JSONObject, end: JSONObject, how: str, paired: JSONObject | None = None) -> Row:
    before, after = _success(start, how), _success(end, how)
    moved = _direction(before, after, paired) if before and after else "same"
    note = f"n = {after['n']:,}" if after else ""
    better = {"rose": True, "fell": False, "same": None}[moved]
    shown = [
        "; ".join(filter(None, (words.share_with_interval(_success(evaluation, how)), _not_graded(evaluation, how))))
        for evaluation in (start, end)
    ]
    return Row(name, shown[0], shown[1], note, better)


def _kl_row(name: str, end: JSONObject, key: str) -> Row:
    sampled = _sampled(end)
    error = sampled.get(f"{key}_se")
    note = f"± {words.number(error, 2)} (standard error)" if error is not None else ""
    return Row(name, "0" if end else words.NOTHING, words.number(sampled.get(key)), note)


def agreement_with_people(store: Store, record: RunRecord) -> JSONObject:
    """The judge's agreement with people's votes: a `sentence`, and `others` that the run recorded beside it.

    As the run recorded it, else from the votes that the store holds now. Without decisive votes the sentence says so.
    """
    judges = [turn.judge["rater_id"] for turn in record.iterations if turn.judge.get("rater_id")]
    found = dict(record.finish.get("agreement_with_people") or {})
    if not found and judges:
        found = asdict(judge_agreement(store, judges[-1]))
    if not found.get("num"):
        return {"sentence": "no human votes", "others": {}}
    share = words.share_with_interval({"value": found["share"], "low": found["low"], "high": found["high"]})
    sentence = f"The judge orders {share} of {found['num']:,} decisive votes as people did"
    apart = [
        f"{found[key]:,} {what}"
        for key, what in (
            ("num_judge_ties", "on pairs it scored the same"),
            ("num_unscored", "on pairs it did not score"),
        )
        if found.get(key)
    ]
    left_out = f"; left out: {', '.join(apart)}" if apart else ""
    known = {"num", "num_agree", "num_judge_ties", "num_unscored", "share", "low", "high"}
    others = {words.title(key): value for key, value in found.items() if key not in known and value is not None}
    return {"sentence": f"{sentence}{left_out}.", "others": others}
