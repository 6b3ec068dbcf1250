"""Grades one episode: JSON on standard input, a score as JSON on standard output."""

import json
import re
import sys

episode = json.load(sys.stdin)
numbers = re.findall(r"\d+", episode["output"])
right = bool(numbers) and int(numbers[-1]) == episode["task"]["answer"]
looked_up = any(message["role"] == "tool" for message in episode["messages"])
print(json.dumps({"score": float(right), "metrics": {"looked_up": looked_up}}))
