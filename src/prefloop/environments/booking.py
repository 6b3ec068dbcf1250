"""Flight booking with tools: a small multi-turn task in which an agent can go wrong in many measurable ways.

The user asks for a flight to a city, under a price, direct or not. Of the four flights to that city exactly one
meets the request, so booking at random succeeds one time in four. The right way is search, filter, book, and a
closing message; skipping the filter, ignoring a constraint, inventing an id, calling in the wrong order and
chattering are all possible, and each is counted.

`Booking.demonstrate` plays the task as a noisy demonstrator would, whose *majority* habit is bad: it skips the
filter and books at random. A model trained on it fails even when it decodes greedily, so there is something to learn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Sequence
from typing import Literal

from pydantic import Field

from prefloop.chat.calls import call_problem
from prefloop.config import Settings
from prefloop.environments.base import Environment, Episode, Outcome, Step
from prefloop.environments.tools import tool_message
from prefloop.records import JSONObject, Message, Role, Split, Task, ToolCall, content_hash

CITIES = (
    "Athens", "Berlin", "Cairo", "Delhi", "Dublin", "Lima", "Lisbon", "Madrid", "Oslo", "Paris", "Seoul", "Tokyo",
)  # fmt: skip
AIRLINES = ("AF", "BA", "JL", "KE", "LH", "NH", "QF", "UA")
FLIGHT_IDS = tuple(f"{airline}{number}" for airline in AIRLINES for number in (17, 28, 39, 46, 63))
PRICE_STEP = 100
PRICE_LIMITS = range(500, 1500, PRICE_STEP)
NUM_FLIGHTS = 4
MAX_WORDS = 6  # words that an assistant message may hold before the rest counts as chatter

TOOLS: tuple[JSONObject, ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }
    for name, description, properties in (
        ("search_flights", "Find flights to a city.", {"city": {"type": "string"}}),
        (
            "filter_results",
            "Keep the flights that fit.",
            {"max_price": {"type": "integer"}, "direct": {"type": "boolean"}},
        ),
        ("book_flight", "Book a flight by its id.", {"flight_id": {"type": "string"}}),
    )
)

_REQUESTS = (
    "Book me a flight to {city} under ${price}, {stops}.",
    "I need to fly to {city}. At most ${price}, {stops}.",
    "Please get me to {city} for up to ${price}, {stops}.",
    "Find me a seat to {city}, budget ${price}, {stops}.",
)
BOOKED = "Your flight is booked."
GAVE_UP = "Sorry, I could not book a flight."

Flight = dict[str, str | int]


class BookingSettings(Settings):
    """Settings of the booking environment. Penalties are in units of one success."""

    name: Literal["booking"] = "booking"
    max_turns: int = Field(default=7, ge=1)
    invented_id_penalty: float = Field(default=0.3, ge=0.0)
    error_penalty: float = Field(default=0.05, ge=0.0)
    extra_turn_penalty: float = Field(default=0.05, ge=0.0)
    chatter_penalty: float = Field(default=0.01, ge=0.0)


class Booking(Environment):
    """The booking environment; see the module's text."""

    name = "booking"
    step_deadline_s = None

    def __init__(self, settings: BookingSettings | None = None) -> None:
        self.settings = settings or BookingSettings()
        self.max_turns = self.settings.max_turns

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """Tasks by number; the seeds of the splits differ in their lowest bit, so that their flights never meet.

        Their requests do: there are few.
        """
        return [_task(split, number) for number in range(first, first + num)]

    def reset(self, task: Task, seed: int) -> BookingEpisode:
        """Open an episode; the flights on offer come from the task and the seed."""
        return BookingEpisode(task, seed, self.settings)

    def demonstrate(self, task: Task, seed: int) -> tuple[tuple[Message, ...], Outcome]:
        """One demonstration by the noisy demonstrator, with its verified outcome."""
        draw = random.Random(f"booking demonstrator {task.id} {seed}")
        habit = draw.choices(list(HABITS), list(HABITS.values()))[0]
        episode = self.reset(task, seed)
        messages = list(episode.messages)
        turns = _play(habit, task.specification, draw)
        message = next(turns)
        while True:
            messages.append(message)
            step = episode.step(message)
            if step.done:
                return tuple(messages), episode.outcome()
            messages.extend(step.messages)
            message = turns.send(json.loads(step.messages[0].content))


def _task(split: Split, number: int) -> Task:
    seed = 2 * number + (split is Split.HELD_OUT)
    draw = random.Random(f"booking task {seed}")
    specification: JSONObject = {
        "city": draw.choice(CITIES),
        "max_price": draw.choice(PRICE_LIMITS),
        "direct": draw.random() < 0.5,
    }
    text = draw.choice(_REQUESTS).format(
        city=specification["city"],
        price=specification["max_price"],
        stops="direct only" if specification["direct"] else "stops are fine",
    )
    prompt = (Message(Role.USER, text),)
    return Task("booking", specification, seed, prompt, TOOLS, split)


class BookingEpisode(Episode):
    """One attempt at booking."""

    def __init__(self, task: Task, seed: int, settings: BookingSettings) -> None:
        self.messages = task.messages
        self.tools = task.tools
        self._wanted = task.specification
        self._settings = settings
        self._luck = content_hash(task.id, seed)
        self._found: list[Flight] | None = None
        self._kept: list[Flight] | None = None
        self._shown: dict[str, Flight] = {}
        self._city_of: dict[str, str] = {}
        self._booked: str | None = None
        self._finished = False
        self._count = dict.fromkeys(
            ("turns", "invented_ids", "errors", "wrong_order", "wrong_tool", "malformed", "chatter"), 0
        )

    def flights(self, city: str) -> list[Flight]:
        """The flights on offer to a city: exactly one meets the request if it is the city asked for."""
        draw = random.Random(f"{self._luck} {city}")
        limit, direct = int(self._wanted["max_price"]), bool(self._wanted["direct"])
        offers = [(draw.randrange(200, limit + 1, PRICE_STEP), 0 if direct else draw.randrange(2))]
        while len(offers) < NUM_FLIGHTS:
            price, stops = draw.randrange(200, 2000, PRICE_STEP), draw.randrange(2)
            if price > limit or (direct and stops):
                offers.append((price, stops))
        draw.shuffle(offers)
        ids = draw.sample(FLIGHT_IDS, NUM_FLIGHTS)
        return [{"id": i, "price": price, "stops": stops} for i, (price, stops) in zip(ids, offers, strict=True)]

    def step(self, message: Message) -> Step:
        """Run the tools that the message calls; a message that calls none ends the episode."""
        self._count["turns"] += 1
        self._count["chatter"] += max(0, len(message.content.split()) - MAX_WORDS)
        if not message.tool_calls:
            self._finished = True
            return Step(done=True)
        return Step(tuple(self._answer(call) for call in message.tool_calls))

    def _answer(self, call: ToolCall) -> Message:
        result = self._run(call)
        if isinstance(result, dict) and "error" in result:
            self._count["errors"] += 1
        return tool_message(call, result)

    def _run(self, call: ToolCall) -> object:
        tools: dict[str, Callable[[JSONObject], object]] = {
            "search_flights": self._search,
            "filter_results": self._filter,
            "book_flight": self._book,
        }
        problem = call_problem(call, self.tools)
        if call.name not in tools:
            self._count["wrong_tool"] += 1
        elif not isinstance(call.arguments, dict):
            self._count["malformed"] += 1
        elif not problem:
            return tools[call.name](call.arguments)
        return {"error": problem}

    def _search(self, arguments: JSONObject) -> object:
        city = arguments.get("city")
        if city not in CITIES:
            return {"error": "unknown city"}
        self._found = self.flights(city)
        self._kept = None
        for flight in self._found:
            self._shown[str(flight["id"])] = flight
            self._city_of[str(flight["id"])] = city
        return self._found

    def _filter(self, arguments: JSONObject) -> object:
        if self._found is None:
            self._count["wrong_order"] += 1
            return {"error": "search first"}
        limit, direct = arguments["max_price"], arguments["direct"]
        self._kept = [f for f in self._found if int(f["price"]) <= limit and not (direct and f["stops"])]
        return self._kept

    def _book(self, arguments: JSONObject) -> object:
        flight_id = arguments.get("flight_id")
        if self._booked is not None:
            return {"error": "a flight is booked already"}
        if self._found is None:
            self._count["wrong_order"] += 1
        if not isinstance(flight_id, str) or flight_id not in self._shown:
            self._count["invented_ids"] += 1
            return {"error": "no such flight"}
        self._booked = flight_id
        return {"booked": flight_id}

    def outcome(self) -> Outcome:
        """Success is a booked flight that meets the request, and a closing message."""
        flight = self._shown[self._booked] if self._booked else None
        ignored = 0
        if self._booked and flight:
            ignored += int(flight["price"]) > int(self._wanted["max_price"])
            ignored += bool(self._wanted["direct"] and flight["stops"])
            ignored += self._city_of[self._booked] != self._wanted["city"]
        success = bool(flight) and not ignored and self._finished
        count, costs = self._count, self._settings
        penalty = costs.invented_id_penalty * count["invented_ids"] + costs.error_penalty * count["errors"]
        penalty += costs.extra_turn_penalty * max(0, count["turns"] - 4) + costs.chatter_penalty * count["chatter"]
        value = float(success) - penalty
        metrics = {**count, "ignored_constraints": ignored, "no_booking": int(flight is None)}
        return Outcome(value, _score(value), success, {name: float(n) for name, n in metrics.items()})


def _score(value: float) -> float:
    """The value in [-1, 1], cut there, mapped linearly to [0, 1]."""
    return (min(max(value, -1.0), 1.0) + 1.0) / 2.0


# --- the noisy demonstrator ---------------------------------------------------------------------------------

Habit = Literal[
    "expert", "skips_filter", "forgets_direct", "wrong_price", "wrong_city",
    "invents_id", "gives_up", "chatters", "books_first",
]  # fmt: skip
HABITS: dict[Habit, float] = {
    "expert": 0.15,
    "skips_filter": 0.58,
    "forgets_direct": 0.07,
    "wrong_price": 0.04,
    "wrong_city": 0.03,
    "invents_id": 0.04,
    "gives_up": 0.03,
    "chatters": 0.03,
    "books_first": 0.03,
}
_CHATTER = "Let me think about this for a moment and look at what the best choice could be."


def _play(habit: Habit, wanted: JSONObject, draw: random.Random) -> Generator[Message, list[Flight], None]:
    words = _CHATTER if habit == "chatters" else ""
    if habit == "books_first":
        yield _call("book_flight", flight_id=draw.choice(FLIGHT_IDS))
    city = draw.choice(CITIES) if habit == "wrong_city" else wanted["city"]
    found = yield _call("search_flights", words, city=city)
    if habit == "gives_up":
        yield Message(Role.ASSISTANT, GAVE_UP)
    if habit not in ("skips_filter", "invents_id", "books_first"):
        limit = draw.choice(PRICE_LIMITS) if habit == "wrong_price" else wanted["max_price"]
        direct = wanted["direct"] and habit != "forgets_direct"
        found = (yield _call("filter_results", words, max_price=limit, direct=direct)) or found
    chosen = draw.choice(FLIGHT_IDS) if habit == "invents_id" else draw.choice(found)["id"]
    yield _call("book_flight", flight_id=chosen)
    yield Message(Role.ASSISTANT, BOOKED)


def _call(name: str, content: str = "", **arguments: object) -> Message:
    return Message(Role.ASSISTANT, content, tool_calls=(ToolCall(name, arguments),))
