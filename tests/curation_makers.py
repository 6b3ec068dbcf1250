"""Small records to curate."""

from collections.abc import Sequence

from prefloop.records import (
    AuthorKind,
    Comparison,
    Ended,
    Judgement,
    Message,
    Role,
    Status,
    ToolCall,
    Trajectory,
    Verdict,
)


def trajectory(name: str, task: str = "t", text: str | None = None, **fields: object) -> Trajectory:
    """A trajectory that says `text` (its own name by default)."""
    call = ToolCall("book_flight", {"id": "F1"}, id=f"call-{name}")
    messages = (
        Message(Role.USER, "book"),
        Message(Role.ASSISTANT, name if text is None else text, tool_calls=(call,)),
        Message(Role.TOOL, "ok", tool_call_id=call.id),
    )
    return Trajectory(name, task, messages, 1, Ended.DONE, AuthorKind.CHECKPOINT, "c0", **fields)


def judgement(name: str, score: float | None, replicate: int = 0, rater: str = "judge") -> Judgement:
    """A judgement with this score, or one that timed out."""
    if score is None:
        return Judgement(name, rater, Status.TIMEOUT, replicate=replicate)
    return Judgement(name, rater, Status.OK, value=10 * score, score=score, replicate=replicate)


def group(task: str, scores: Sequence[float | None]) -> tuple[list[Trajectory], list[Judgement]]:
    """A task's trajectories, named by their position, with one judgement each."""
    names = [f"{task}{position}" for position in range(len(scores))]
    return [trajectory(name, task) for name in names], list(map(judgement, names, scores))


def vote(a: str, b: str, verdict: Verdict, voter: str = "ann") -> Comparison:
    """A person's vote."""
    return Comparison(a, b, voter, Status.OK, verdict, idempotency_key=f"{voter}-{a}-{b}-{verdict.value}")
