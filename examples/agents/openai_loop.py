"""An agent on OpenAI's SDK: a plain loop over tool calls. It knows nothing of who trains its model."""

import json
import os
import sys

from openai import OpenAI
from stock import look_up

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look up how many there are in stock.",
            "parameters": {
                "properties": {"goods": {"type": "string"}, "town": {"type": "string"}},
                "required": ["goods", "town"],
                "type": "object",
            },
        },
    }
]
MAX_TURNS = 6


def call(name: str, arguments: str) -> str:
    """The result of a tool call; what is wrong with it is for the model to read."""
    try:
        return look_up(**json.loads(arguments)) if name == "look_up" else f"error: there is no tool {name!r}"
    except (TypeError, ValueError) as error:
        return f"error: {error}"


def answer(question: str) -> str:
    """Ask the model, and do what it asks, until it answers."""
    client = OpenAI()  # address and key are in OPENAI_BASE_URL and OPENAI_API_KEY
    messages: list = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        reply = client.chat.completions.create(model=os.environ.get("MODEL", "policy"), messages=messages, tools=TOOLS)
        message = reply.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content or ""
        for asked in message.tool_calls:
            result = call(asked.function.name, asked.function.arguments)
            messages.append({"role": "tool", "tool_call_id": asked.id, "content": result})
    return ""


if __name__ == "__main__":
    print(answer(sys.argv[1]))
