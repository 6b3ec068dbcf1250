"""Is it really better? Pure functions over records and numbers; no torch."""

from prefloop.evaluation.compare import Flips, compare_on_tasks, flipped_items, outcomes_by_task
from prefloop.evaluation.guard import Decision, evaluation_guard, kl_guard
from prefloop.evaluation.judging import Calibration, judge_calibration
from prefloop.evaluation.kl import KLSummary, full_vocabulary_kl, kl_summary, summarise_kl
from prefloop.evaluation.success import success_summary

__all__ = [
    "Calibration",
    "Decision",
    "Flips",
    "KLSummary",
    "compare_on_tasks",
    "evaluation_guard",
    "flipped_items",
    "full_vocabulary_kl",
    "judge_calibration",
    "kl_guard",
    "kl_summary",
    "outcomes_by_task",
    "success_summary",
    "summarise_kl",
]
