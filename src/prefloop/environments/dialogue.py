"""A language tutor in a café, whose right answer depends on how well the learner speaks, which nobody says.

The learner wants to order two things of the menu and needs the phrase for it; each level has a phrase of its own. What
the learner says of the day carries the level: a beginner says one short sentence, mostly with a wrong verb; an
intermediate joins two, rarely with one; an advanced learner has rarer verbs and none wrong. Some say such a sentence at
once, and the tutor has to read it; most do not, and the tutor has to ask. A question that can be answered by yes or no
brings nothing, and whoever is asked too often leaves. A policy that ignores the level is right as often as its guess.

`Dialogue.demonstrate` plays a tutor whose *majority* habit is bad: it shows off, at once and to everybody.
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator, Sequence
from enum import IntEnum
from typing import Final, Literal

from pydantic import Field

from prefloop.config import Settings
from prefloop.environments.base import Environment, Episode, Outcome, Step
from prefloop.environments.tools import answer_calls
from prefloop.records import JSONObject, Message, Role, Split, Task, content_hash


class Level(IntEnum):
    """How well a learner speaks."""

    BEGINNER = 0
    INTERMEDIATE = 1
    ADVANCED = 2


SHARES: Final = {Level.BEGINNER: 0.40, Level.INTERMEDIATE: 0.35, Level.ADVANCED: 0.25}
"""How many learners are of each level."""

PHRASES: Final = {
    Level.BEGINNER: "Hello, {drink} and {food}, please.",
    Level.INTERMEDIATE: "I would like {drink} and {food}, please.",
    Level.ADVANCED: "I was wondering whether I could have {drink} and {food}.",
}
DRINKS = (
    "Chai", "Cider", "Cocoa", "Cola", "Espresso", "Juice", "Latte", "Lemonade", "Milk", "Mocha", "Sherbet", "Water",
)  # fmt: skip
FOODS = (
    "Bagel", "Biscuit", "Bread", "Cake", "Crumpet", "Muffin", "Omelette", "Pancake", "Pie", "Salad", "Soup", "Toast",
)  # fmt: skip
INSTRUCTION = (
    "You teach English in a café. The learner wants the phrase to order something. Say the phrase for the level of the "
    "learner and nothing else. "
    + " ".join(f"{level.name.title()}: {PHRASES[level].format(drink='Tea', food='Scone')}" for level in Level)
    + " If you cannot tell the level yet, ask one open question first."
)
REQUESTS = ("{drink} and {food}?", "The phrase for {drink} and {food}?", "{drink} and {food}, how?")
OPEN_QUESTIONS = ("What did you do today?", "How was your morning?", "Tell me about your day.")
CLOSED_QUESTIONS = ("Do you like it here?", "Are you hungry?")

# --- what a learner says ------------------------------------------------------------------------------------

VERBS: Final = (
    ("go to", "went to", "wandered over to"),
    ("see", "saw", "came across"),
    ("find", "found", "stumbled upon"),
    ("draw", "drew", "sketched"),
    ("leave", "left", "set off from"),
)
"""As a beginner says it (wrong, of what is past), rightly, and richly."""
PLACES = ("the market", "the river", "the museum", "the station", "the park", "the old bridge")
JOINED, RICHLY_JOINED = (" and then I ", " and I "), (" before I ", " once I ")
SLIPS: Final = {Level.BEGINNER: 0.7, Level.INTERMEDIATE: 0.3, Level.ADVANCED: 0.0}
"""How often a clause of a learner of each level has a wrong verb (an intermediate: the first of two)."""
_RICH = re.compile("|".join(rich for _, _, rich in VERBS))
_PLAIN = re.compile("|".join(f"I (?:{wrong}|{right}) " for wrong, right, _ in VERBS))


def sentence(level: Level, draw: random.Random) -> str:
    """What a learner of this level says of the day."""
    (wrong, right, rich), second = draw.sample(VERBS, 2)
    there, elsewhere = draw.sample(PLACES, 2)
    slips = draw.random() < SLIPS[level]
    if level is Level.ADVANCED:
        return f"I {rich} {there}{draw.choice(RICHLY_JOINED)}{second[2]} {elsewhere}."
    first = f"I {wrong if slips else right} {there}"
    if level is Level.BEGINNER:
        return f"{first}."
    return f"{first}{draw.choice(JOINED)}{second[1]} {elsewhere}."


def read_level(text: str) -> Level | None:
    """The level that shows in what a learner said, None where none does: by its words and its length."""
    if _RICH.search(text):
        return Level.ADVANCED
    if not _PLAIN.search(text):
        return None
    return Level.INTERMEDIATE if any(joint in text for joint in JOINED) else Level.BEGINNER


# --- what a tutor says --------------------------------------------------------------------------------------

_ASKED = re.compile(r"\?\W*$|^\W*tell me\b", re.IGNORECASE)
_CLOSED = re.compile(r"\W*(?:do|does|did|are|is|was|were|can|could|have|has|will|would)\b", re.IGNORECASE)


def is_question(text: str) -> bool:
    """Whether a tutor asks something."""
    return bool(_ASKED.search(text.strip()))


def is_open(question: str) -> bool:
    """Whether a question takes more than yes or no to answer: by the last of its sentences."""
    last = re.split(r"(?<=[.!?])\s+", question.strip())[-1]
    return "tell me" in last.casefold() or not _CLOSED.match(last)


def level_of_answer(text: str, order: JSONObject) -> Level | None:
    """The level of which an answer is the phrase for this order; None where it is none's. Case does not count."""
    said = _plain(text)
    return next((level for level in Level if said == _plain(phrase(level, order))), None)


def phrase(level: Level, order: JSONObject) -> str:
    """The right phrase for an order, to a learner of this level."""
    return PHRASES[level].format(drink=order["drink"], food=order["food"])


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# --- the environment ----------------------------------------------------------------------------------------


class DialogueSettings(Settings):
    """Settings of the café. Penalties are in units of one success.

    A `talkative` share of the learners shows the level at once. A learner who is asked more than `patience` questions
    leaves.
    """

    name: Literal["dialogue"] = "dialogue"
    max_turns: int = Field(default=5, ge=1)
    talkative: float = Field(default=0.3, ge=0.0, le=1.0)
    patience: int = Field(default=3, ge=0)
    question_penalty: float = Field(default=0.1, ge=0.0)
    unclear_penalty: float = Field(default=0.1, ge=0.0)


class Dialogue(Environment):
    """The café; see the module's text."""

    name = "dialogue"
    step_deadline_s = None

    def __init__(self, settings: DialogueSettings | None = None) -> None:
        self.settings = settings or DialogueSettings()
        self.max_turns = self.settings.max_turns

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """Tasks by number; the hash of what is ordered says the split, so that no order is in both."""
        return [self._task(split, number) for number in range(first, first + num)]

    def _task(self, split: Split, number: int) -> Task:
        draw = random.Random(f"dialogue task {split.value} {number}")
        drink, food = draw.choice(ORDERS[split])
        level = draw.choices(list(SHARES), list(SHARES.values()))[0]
        order = {"drink": drink, "food": food, "level": level.name.lower()}
        text = draw.choice(REQUESTS).format(drink=drink, food=food)
        if draw.random() < self.settings.talkative:
            text = f"{sentence(level, draw)} {text}"
        prompt = (Message(Role.SYSTEM, INSTRUCTION), Message(Role.USER, text))
        return Task(self.name, order, number, prompt, split=split)

    def reset(self, task: Task, seed: int) -> DialogueEpisode:
        """Open an episode; what the learner answers comes from the task and the seed."""
        return DialogueEpisode(task, seed, self.settings)

    def demonstrate(self, task: Task, seed: int) -> tuple[tuple[Message, ...], Outcome]:
        """One demonstration by a tutor of mostly bad habits, with its verified outcome."""
        draw = random.Random(f"dialogue demonstrator {task.id} {seed}")
        habit = draw.choices(list(HABITS), list(HABITS.values()))[0]
        episode = self.reset(task, seed)
        messages = list(episode.messages)
        turns = _tutor(habit, task, draw)
        text = next(turns)
        while True:
            messages.append(Message(Role.ASSISTANT, text))
            step = episode.step(messages[-1])
            if step.done:
                return tuple(messages), episode.outcome()
            messages.extend(step.messages)
            text = turns.send(step.messages[0].content)


def _split_of(drink: str, food: str) -> Split:
    return Split.HELD_OUT if int(content_hash("dialogue order", drink, food), 16) % 2 else Split.TRAIN


ORDERS: Final = {
    split: tuple((drink, food) for drink in DRINKS for food in FOODS if _split_of(drink, food) is split)
    for split in Split
}
"""What is ordered together in each split."""


class DialogueEpisode(Episode):
    """One learner."""

    def __init__(self, task: Task, seed: int, settings: DialogueSettings) -> None:
        self.messages = task.messages
        self.tools = task.tools
        self._order = task.specification
        self._level = Level[task.specification["level"].upper()]
        self._luck = content_hash(task.id, seed)
        self._settings = settings
        self._shown = read_level(task.messages[-1].content) is not None
        self._answered: Level | None = None
        self._count = dict.fromkeys(("turns", "questions", "asked_too_much", "unclear", "errors", "left"), 0)

    def step(self, message: Message) -> Step:
        """Answer a question; anything else is the tutor's phrase, and ends the episode."""
        self._count["turns"] += 1
        if message.tool_calls:  # there are no tools in a café
            self._count["errors"] += 1
            return Step(answer_calls(message, self.tools))
        if is_question(message.content):
            return self._asked(message.content)
        self._answered = level_of_answer(message.content, self._order)
        self._count["unclear"] += self._answered is None
        return Step(done=True)

    def _asked(self, question: str) -> Step:
        self._count["questions"] += 1
        helps = is_open(question) and not self._shown
        self._count["asked_too_much"] += not helps
        if self._count["questions"] > self._settings.patience:
            self._count["left"] = 1
            return Step(done=True)
        draw = random.Random(f"{self._luck} {self._count['questions']}")
        said = sentence(self._level, draw) if is_open(question) else draw.choice(("Yes.", "No."))
        self._shown |= is_open(question)
        return Step((Message(Role.USER, said),))

    def outcome(self) -> Outcome:
        """Success is the phrase for what was ordered, at the learner's level."""
        said, count = self._answered, self._count
        success = said is self._level
        penalty = self._settings.question_penalty * count["asked_too_much"]
        penalty += self._settings.unclear_penalty * (count["unclear"] + count["errors"])
        value = float(success) - penalty
        metrics = {
            **count,
            "right_level": int(success),
            "too_hard": int(said is not None and said > self._level),
            "too_easy": int(said is not None and said < self._level),
            "no_answer": int(said is None and not count["unclear"]),
        }
        score = (min(max(value, -1.0), 1.0) + 1.0) / 2.0
        return Outcome(value, score, success, {name: float(n) for name, n in metrics.items()})


# --- the demonstrator ---------------------------------------------------------------------------------------

Habit = Literal["expert", "shows_off", "guesses", "asks_in_vain", "asks_twice", "mishears", "says_nothing"]
HABITS: dict[Habit, float] = {
    "expert": 0.15,
    "shows_off": 0.58,
    "guesses": 0.10,
    "asks_in_vain": 0.06,
    "asks_twice": 0.03,
    "mishears": 0.04,
    "says_nothing": 0.04,
}


def _tutor(habit: Habit, task: Task, draw: random.Random) -> Generator[str, str, None]:
    """What a tutor of this habit says, given what the learner answers; the level is read from that alone."""
    order = task.specification
    level = read_level(task.messages[-1].content)
    asks = {"asks_twice": 2, "expert": int(level is None), "mishears": int(level is None)}.get(habit, 0)
    for _ in range(asks):
        level = read_level((yield draw.choice(OPEN_QUESTIONS)))
    if habit == "asks_in_vain":
        yield draw.choice(CLOSED_QUESTIONS)
    if habit == "guesses":
        level = draw.choice(list(Level))
    if habit == "mishears":
        order = {**order, "food": draw.choice([food for food in FOODS if food != order["food"]])}
    if habit in ("shows_off", "asks_in_vain") or level is None:
        level = Level.ADVANCED
    yield "Enjoy your stay." if habit == "says_nothing" else phrase(level, order)
