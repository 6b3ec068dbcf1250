"""`prefloop doctor`: what is installed, which devices, extras, keys and templates work, whether the store is whole."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from prefloop import __version__
from prefloop.clients import anthropic, openai_compatible
from prefloop.hub import fetch_model, readable
from prefloop.records import JSONObject, Message, PrefloopError, Role, Source, ToolCall
from prefloop.store import Store, database

if TYPE_CHECKING:
    from prefloop.chat import ChatRenderer
    from prefloop.models.settings import PolicySettings

EXTRAS = {
    "train": "train models and roll them out",
    "report": "HTML reports",
    "web": "prefloop annotate, and the gateway for agents",
    "parquet": "Parquet in and out",
    "bitsandbytes": "weights of 8 or 4 bits below an adapter",
    "anthropic": "judges over the Anthropic API",
    "openai": "judges and policies on OpenAI-compatible servers",
    "reasoning-gym": "the environments of reasoning-gym",
    "mcp": "the tools of MCP servers",
    "agentdojo": "the environments of AgentDojo",
    "langgraph": "the example agent that is written in it",
    "tensorboard": "metrics of training for TensorBoard",
    "trackio": "metrics of training for trackio",
    "wandb": "metrics of training for Weights & Biases",
}
KEYS = (anthropic.KEY_VARIABLE, openai_compatible.KEY_VARIABLE)
BUILT_IN = "the built-in tiny model"

_MARKS = {True: Text("✓", "green"), False: Text("✗", "bold red"), None: Text("–", "dim")}

_TOOL: JSONObject = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_QUESTION = Message(Role.USER, "What is a heron?")
_ANSWER = Message(Role.ASSISTANT, "A bird.")
_THOUGHT = Message(Role.ASSISTANT, "A bird.", "Herons wade.")
_CALL = Message(Role.ASSISTANT, tool_calls=(ToolCall("look_up", {"word": "heron"}, "call00001"),))
_RESULT = Message(Role.TOOL, "a wading bird", tool_call_id="call00001", name="look_up")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `good` is None for what is merely absent and not needed."""

    good: bool | None
    what: str
    detail: str = ""


def examine(store_location: str, policy: PolicySettings | None, console: Console) -> bool:
    """Look at everything and print it; whether nothing is broken.

    Args:
        store_location: path or database URL of the store; that there is none yet is no fault.
        policy: the model whose chat template is tried, and how it is to speak; None for the built-in one alone.
        console: where to print.
    """
    sections: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("prefloop", _versions),
        ("extras", _extras),
        ("devices", _devices),
        ("keys", _keys),
        ("chat templates", lambda: _templates(policy)),
        (f"store {store_location}", lambda: _store(store_location)),
    )
    healthy = True
    for title, look in sections:
        table = Table.grid(padding=(0, 2), pad_edge=True)
        console.print(Text(title, "bold"))
        for finding in look():
            table.add_row(_MARKS[finding.good], Text(finding.what), Text(finding.detail))
            healthy = healthy and finding.good is not False
        console.print(table)
    return healthy


# --- the installation -------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding(True, "prefloop", __version__)
    yield Finding(True, "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages(_requirements().get("", []))


def _extras() -> Iterator[Finding]:
    needed = _requirements()
    for extra, purpose in EXTRAS.items():
        found = {name: _installed(name) for name in needed.get(extra, [])}
        missing = [name for name, have in found.items() if not have]
        if missing:
            yield Finding(None, extra, f"{purpose}: pip install 'prefloop[{extra}]' (missing: {', '.join(missing)})")
        else:
            yield Finding(True, extra, ", ".join(f"{name} {have}" for name, have in found.items()))


def _packages(names: Sequence[str]) -> Iterator[Finding]:
    found = {name: _installed(name) for name in names}
    missing = [name for name, have in found.items() if not have]
    yield Finding(True, "packages", ", ".join(f"{name} {have}" for name, have in found.items() if have))
    if missing:
        yield Finding(False, "packages", f"missing: {', '.join(missing)}; install again: pip install prefloop")


def _requirements() -> dict[str, list[str]]:
    """Names of the packages that each extra needs; those that are always needed under the empty name."""
    found: dict[str, list[str]] = {}
    for line in requires("prefloop") or ():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if name is not None:
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if _installed("torch") is None:
        yield Finding(True, "cpu", f"{allowed} cores")
        yield Finding(None, "cuda", "unknown without torch")
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(False, "torch", f"is installed, but cannot be imported: {_one_line(error)}")
        return
    yield Finding(True, "cpu", f"{allowed} cores, {torch.get_num_threads()} threads of torch")
    if not torch.cuda.is_available():
        yield Finding(None, "cuda", f"no device that torch {torch.__version__} can use; models run on the CPU")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(True, f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _keys() -> Iterator[Finding]:
    """Whether keys are there; never what they are."""
    for name in KEYS:
        given = bool(os.environ.get(name, "").strip())
        yield Finding(given or None, name, "is set" if given else "is not set; only a judge over that API needs it")


# --- chat templates ---------------------------------------------------------------------------------------------


def _templates(policy: PolicySettings | None) -> Iterator[Finding]:
    model = policy.model if policy is not None else None
    if _installed("transformers") is None or _installed("torch") is None:
        yield Finding(False if model else None, model or BUILT_IN, "needs pip install 'prefloop[train]'")
        return
    from prefloop.chat import ChatRenderer

    yield from _template(BUILT_IN, lambda: ChatRenderer(_built_in_tokenizer()))
    if policy is not None and model:
        yield from _template(model, lambda: policy.renderer(_tokenizer_of(model)))


def _built_in_tokenizer() -> Any:
    from prefloop.models.initial import train_tokenizer

    return train_tokenizer([((_QUESTION, _ANSWER), ()), ((_QUESTION, _CALL, _RESULT, _ANSWER), (_TOOL,))], 512)


def _tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    directory = fetch_model(model, weights=False)
    with readable("its tokenizer"):
        return AutoTokenizer.from_pretrained(directory)


def _template(name: str, load: Callable[[], ChatRenderer]) -> Iterator[Finding]:
    """Tries a chat template: without prompts, masks or an end of turn a policy cannot be trained; tools are extra."""
    try:
        renderer = load()
        yield Finding(True, name, f"renders a prompt of {len(renderer.render_prompt([_QUESTION]).token)} tokens")
        yield Finding(True, "", _masked(renderer))
    except PrefloopError as error:
        yield Finding(False, name, str(error))
        return
    yield _reasoning(renderer)
    yield _tools(renderer)


def _masked(renderer: ChatRenderer) -> str:
    from prefloop.chat import render_demonstration, stop_ids

    stops = stop_ids(renderer)
    paths = render_demonstration(renderer, [_QUESTION, _ANSWER, _QUESTION, _ANSWER], name="of two turns")
    own = sum(int((path.source == int(Source.SAMPLED)).sum()) for path in paths)
    total = sum(len(path.token) for path in paths)
    shape = "one token path" if len(paths) == 1 else f"{len(paths)} token paths, because it rewrites earlier turns"
    ends = f"{len(stops)} stop token{'' if len(stops) == 1 else 's'}"
    return f"masks a demonstration: {own} of {total} tokens are the policy's own, {ends}, {shape}"


def _reasoning(renderer: ChatRenderer) -> Finding:
    """Whether a turn is its reasoning and its answer, or its answer alone."""
    from prefloop.chat import render_demonstration

    try:
        (path,) = render_demonstration(renderer, [_QUESTION, _THOUGHT], name="with reasoning")
    except PrefloopError as error:
        return Finding(None, "", f"no reasoning: {error}")
    said = renderer.encoder.decode(path.token[path.loss_mask].tolist())
    if _THOUGHT.reasoning_content in said:
        return Finding(True, "", "a turn is its reasoning and its answer")
    return Finding(None, "", "no reasoning: the template leaves it out, a turn is its answer alone")


def _tools(renderer: ChatRenderer) -> Finding:
    """Whether a tool call goes into the template and comes out again."""
    from prefloop.chat import AssistantParser, render_demonstration

    try:
        (path, *_) = render_demonstration(renderer, [_QUESTION, _CALL, _RESULT, _ANSWER], [_TOOL], name="with tools")
    except PrefloopError as error:
        return Finding(None, "", f"no tools: {error}")
    parser = AssistantParser(renderer)
    prompt = path.token[: int(path.loss_mask.argmax())]
    turn = path.token[path.loss_mask & (path.message == 1)]
    said = parser.parse_assistant(turn.tolist(), prompt.tolist(), [_TOOL])
    if [(call.name, call.arguments) for call in said.tool_calls] != [(c.name, c.arguments) for c in _CALL.tool_calls]:
        advice = (
            "give the tokenizer a response_template, or set policy.tool_format (here --set policy.tool_format=FORMAT)"
        )
        return Finding(None, "", f"shows tool calls, but no tool format reads them back: {advice}")
    return Finding(True, "", f"tool calls go in and read back (format {parser.tool_format})")


# --- the store --------------------------------------------------------------------------------------------------


def _store(location: str) -> Iterator[Finding]:
    url = database.store_url(location)
    path = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not path.exists():
        yield Finding(None, "none yet", "a run or an import makes it; another is named with --store or PREFLOOP_STORE")
        return
    try:
        with Store(location, must_exist=True) as store:
            yield from _opened(store)
    except (PrefloopError, DatabaseError) as error:
        yield Finding(False, "store", _one_line(error))


def _opened(store: Store) -> Iterator[Finding]:
    problems = database.integrity_problems(store.engine)
    yield Finding(not problems, "integrity", "; ".join(problems[:3]) or "pages, constraints and references are whole")
    if problems:
        return
    with store.reading() as connection:
        schema = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    yield Finding(schema == database.HEAD, "schema", f"version {schema}; this prefloop writes {database.HEAD}")
    if store.engine.dialect.name == "sqlite":
        yield _journal(store)
    counts = [f"{number:,} {name.replace('_', ' ')}" for name, number in store.counts().items() if number]
    yield Finding(True, "rows", ", ".join(counts) or "none")
    yield _datasets(store)
    yield from _checkpoints(store)


def _journal(store: Store) -> Finding:
    with store.reading() as connection:
        mode = connection.execute(text("PRAGMA journal_mode")).scalar_one()
    since = ".".join(map(str, database.WAL_SAFE_SINCE))
    safe = database.journal_mode() == "WAL"
    why = f"write-ahead logging is free of its corruption bug since {since}" + ("" if safe else ": not used here")
    return Finding(True, "journal", f"{mode}; SQLite {sqlite3.sqlite_version}, {why}")


def _datasets(store: Store) -> Finding:
    ids = [str(row["id"]) for row in store.datasets()]
    damaged = []
    for dataset_id in ids:
        try:
            store.dataset(dataset_id)
        except PrefloopError as error:
            damaged.append(str(error))
    detail = "; ".join(damaged[:3]) or f"{len(ids)} frozen, each with the content that its hash says"
    return Finding(not damaged, "datasets", detail)


def _checkpoints(store: Store) -> Iterator[Finding]:
    from prefloop.training.checkpoint import verify

    num_whole = 0
    for checkpoint in store.checkpoints():
        if not checkpoint.manifest_hash:
            continue  # a model that was there before and is not ours to check
        try:
            if verify(Path(checkpoint.path)) != checkpoint.manifest_hash:
                raise PrefloopError(f"{checkpoint.path} is whole, but not what was recorded")
            num_whole += 1
        except (PrefloopError, OSError) as error:
            yield Finding(False, f"checkpoint {checkpoint.id[:12]}", f"{_one_line(error)} (looked from {Path.cwd()})")
    yield Finding(True, "checkpoints", f"{num_whole} whole, every file as its manifest says")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
