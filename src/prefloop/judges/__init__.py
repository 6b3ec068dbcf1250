"""Frozen judges: rules over verified outcomes, and language models that follow a rubric."""

from prefloop.judges.base import Judge, JudgeItem, JudgingReport, JudgingSettings, judge_all, judge_items

__all__ = ["Judge", "JudgeItem", "JudgingReport", "JudgingSettings", "judge_all", "judge_items"]
