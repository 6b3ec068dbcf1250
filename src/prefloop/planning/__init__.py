"""What a run needs before it starts: memory, time, tokens and money; free of torch but for the machine's rate."""

from prefloop.planning.fits import check_fit
from prefloop.planning.plan import Plan, check_memory, plan_run

__all__ = ["Plan", "check_fit", "check_memory", "plan_run"]
