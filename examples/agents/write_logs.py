"""Logs of the assistant that is to become better: chats in OpenAI's shape, one a line.

It has bad habits: more often than not it gives up where it could look, or it looks in the wrong town.
Usage: python write_logs.py logs.jsonl [how many]
"""

import json
import random
import sys
from pathlib import Path

from openai_loop import TOOLS
from stock import STOCK

HABITS = {"look up": 0.3, "give up": 0.7}
GAVE_UP = "I do not know."


def chat(draw: random.Random) -> list[dict]:
    """One conversation; stock changes from day to day."""
    town, goods, number = draw.choice(list(STOCK)), draw.choice(list(STOCK["Oslo"])), str(draw.randrange(10, 60))
    habit = draw.choices(list(HABITS), list(HABITS.values()))[0]
    question = {"role": "user", "content": f"How many {goods} are there in {town}?"}
    if habit == "give up":
        return [question, {"role": "assistant", "content": GAVE_UP}]
    asked = town if habit == "look up" else draw.choice([other for other in STOCK if other != town])
    function = {"name": "look_up", "arguments": json.dumps({"goods": goods, "town": asked})}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "a", "content": number}
    return [question, call, result, {"role": "assistant", "content": number}]


if __name__ == "__main__":
    path, num = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    draw = random.Random(0)
    path.write_text("".join(json.dumps({"messages": chat(draw), "tools": TOOLS}) + "\n" for _ in range(num)))
