"""What the example agents can do: look up how much of something is in stock in a town."""

import json
from pathlib import Path

STOCK = json.loads(Path(__file__).with_name("stock.json").read_text())


def look_up(goods: str, town: str) -> str:
    """Look up how many there are in stock."""
    try:
        return str(STOCK[town][goods])
    except KeyError:
        return f"error: there is no {goods!r} or no {town!r}"
