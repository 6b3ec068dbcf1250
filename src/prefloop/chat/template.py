"""Chat templates as programs: compiled once in a sandbox, and read to learn which strings they look into."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from prefloop.records import PrefloopError

if TYPE_CHECKING:
    from jinja2 import Environment, nodes


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# `strftime_now` must not make the same messages other tokens tomorrow: the clock of templates stands still.
TEMPLATE_DATE: Final = datetime(2025, 1, 1)

_SEQUENCES = frozenset({"messages", "loop_messages", "tools", "tool_calls", "documents", "conversation", "ns"})
_COMPARABLE = frozenset({"role", "type", "name", "id", "tool_call_id", "index", "index0", "length", "last", "first"})
_SAFE_FILTERS = words(
    "trim tojson items list string safe default d map select selectattr reject rejectattr first last dictsort "
    "reverse join"
)
_CASES = words("upper lower title capitalize")  # known on roles and names; of content they would hide what is compared
_STRIPS = frozenset({"strip", "lstrip", "rstrip"})
_SEARCHES = words(
    "split rsplit startswith endswith replace find rfind index partition rpartition removeprefix removesuffix"
)
_SAFE_METHODS = words("items keys values get append update join format")
_TYPE_TESTS = words("defined undefined none string mapping iterable sequence number boolean integer float true false")
_EQUALITY_TESTS = frozenset({"equalto", "eq", "ne", "==", "!=", "in"})


class StoppedError(Exception):
    """A rendering was stopped (`stoppable`): nothing is known of the messages."""


_STOP: ContextVar[Callable[[], bool] | None] = ContextVar("stop", default=None)


@contextmanager
def stoppable(stop: Callable[[], bool]) -> Iterator[None]:
    """Within, no template is run any more once `stop` is true: a long conversation takes many runs.

    Raises:
        StoppedError: it was stopped.
    """
    token = _STOP.set(stop)
    try:
        yield
    finally:
        _STOP.reset(token)


class ChatTemplate:
    """A Jinja chat template; renders plain data to text.

    Args:
        source: the template's text.
        variables: what else the template sees: special tokens and settings such as `enable_thinking`.

    Raises:
        PrefloopError: jinja2 is missing, or the text is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = _environment()
        try:
            self._compiled = environment.from_string(source)
            self.habits = _habits(environment, source)
        except Exception as error:
            raise PrefloopError(f"the chat template is not valid Jinja: {_one_line(error)}") from error
        self.source = source
        self._variables = dict(variables)

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """The template's text for these messages.

        Raises:
            PrefloopError: the template refuses them; the error names the roles and the template's own words.
            StoppedError: within `stoppable`.
        """
        stop = _STOP.get()
        if stop is not None and stop():
            raise StoppedError
        try:
            return self._compiled.render(
                **self._variables, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a stranger's program: it may fail in any way
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
            with_tools = " with tools" if tools else ""
            raise PrefloopError(
                f"the chat template fails on messages of roles {roles}{with_tools}: {_one_line(error)}; "
                "change the messages or give a template that takes them"
            ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _environment() -> Environment:
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise PrefloopError("chat templates need jinja2: pip install 'prefloop[train]'") from error

    class Generation(Extension):
        """`{% generation %}` marks assistant text for other renderers; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own contract

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# --- which strings a template looks into --------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """What a template may do with the text of messages.

    A string that holds none of `searched`, equals none of `compared` and has no white space at its ends takes
    the same way through the template as any other such string, if `predictable`; where the template uses
    something that this reading does not know, nothing is promised and every rendering is checked.
    """

    searched: tuple[str, ...]
    compared: frozenset[str]
    predictable: bool


def _habits(environment: Environment, source: str) -> Habits:
    from jinja2 import nodes

    tree = environment.parse(source)
    searched: set[str] = set()
    compared: set[str] = set()
    predictable = True
    readers: tuple[tuple[type[nodes.Node], Callable[[Any], _Reading]], ...] = (
        (nodes.Compare, _read_compare),
        (nodes.Filter, _read_filter),
        (nodes.Test, _read_test),
        (nodes.Call, _read_call),
        (nodes.Getitem, _read_item),
    )
    for kind, read in readers:
        for node in tree.find_all(kind):
            reading = read(node)
            searched |= reading.searched
            compared |= reading.compared
            predictable &= reading.known
    searched.discard("")
    return Habits(tuple(sorted(searched, key=len, reverse=True)), frozenset(compared), predictable)


@dataclass(frozen=True)
class _Reading:
    searched: frozenset[str] = frozenset()
    compared: frozenset[str] = frozenset()
    known: bool = True


_UNKNOWN = _Reading(known=False)


def _strings(node: nodes.Node) -> frozenset[str]:
    from jinja2 import nodes as n

    found = {c.value for c in node.find_all(n.Const) if isinstance(c.value, str)}
    if isinstance(node, n.Const) and isinstance(node.value, str):
        found.add(node.value)
    return frozenset(found)


def _is_constant(node: nodes.Node) -> bool:
    from jinja2 import nodes as n

    return isinstance(node, n.Const) or (isinstance(node, n.List | n.Tuple) and all(map(_is_constant, node.items)))


def _last_name(node: nodes.Node) -> str:
    """The name that an expression ends with: `content` of `message.content`, `message['content']`, `content`."""
    from jinja2 import nodes as n

    if isinstance(node, n.Name):
        return node.name
    if isinstance(node, n.Getattr):
        return node.attr
    if isinstance(node, n.Getitem):
        if isinstance(node.arg, n.Const) and isinstance(node.arg.value, str):
            return node.arg.value
        return _last_name(node.node)
    if isinstance(node, n.Filter) and node.node is not None:
        return node.name if node.name in ("length", "count") else _last_name(node.node)
    return ""


def _operands(node: nodes.Compare) -> Iterator[tuple[nodes.Expr, str, nodes.Expr]]:
    left = node.expr
    for operand in node.ops:
        yield left, operand.op, operand.expr
        left = operand.expr


def _read_compare(node: nodes.Compare) -> _Reading:
    searched: frozenset[str] = frozenset()
    compared: frozenset[str] = frozenset()
    for left, op, right in _operands(node):
        if op not in ("eq", "ne", "in", "notin"):
            continue
        names = {_last_name(left), _last_name(right)}
        if not (_is_constant(left) or _is_constant(right)) and not names <= _COMPARABLE | _SEQUENCES:
            if not _is_number(left) and not _is_number(right) and not names & _COMPARABLE:
                return _UNKNOWN
        elif op in ("in", "notin") and _is_constant(left):
            searched |= _strings(left)
        elif not names & {"role", "type"}:
            compared |= _strings(left) | _strings(right)
    return _Reading(searched, compared)


def _is_number(node: nodes.Expr) -> bool:
    from jinja2 import nodes as n

    return isinstance(node, n.Sub | n.Add | n.Mod | n.Mul | n.FloorDiv) or _last_name(node) in ("length", "count")


def _read_filter(node: nodes.Filter) -> _Reading:
    if node.name in ("length", "count"):
        return _Reading(known=node.node is not None and _last_name(node.node) in _SEQUENCES)
    if node.name == "replace":
        return _Reading(searched=_strings(node))
    if node.name in _CASES:
        return _Reading(known=node.node is not None and _last_name(node.node) in _COMPARABLE)
    return _Reading(known=node.name in _SAFE_FILTERS)


def _read_test(node: nodes.Test) -> _Reading:
    if node.name in _EQUALITY_TESTS:
        return _Reading(compared=_strings(node))
    return _Reading(known=node.name in _TYPE_TESTS)


def _read_call(node: nodes.Call) -> _Reading:
    from jinja2 import nodes as n

    if not isinstance(node.node, n.Getattr):
        return _Reading()  # a macro or a function of ours: its body is read where it stands
    method = node.node.attr
    constants = frozenset().union(*(_strings(argument) for argument in node.args))
    if method in _SEARCHES:
        return _Reading(searched=constants, known=bool(constants) and all(map(_is_constant, node.args)))
    if method in _CASES:
        return _Reading(known=_last_name(node.node.node) in _COMPARABLE)
    if method in _STRIPS:
        return _Reading(known=not "".join(constants).strip() and all(map(_is_constant, node.args)))
    return _Reading(known=method in _SAFE_METHODS)


def _read_item(node: nodes.Getitem) -> _Reading:
    from jinja2 import nodes as n

    if isinstance(node.arg, n.Const) and isinstance(node.arg.value, str):
        return _Reading()
    pieces_of_text = isinstance(node.node, n.Call) and isinstance(node.node.node, n.Getattr)
    return _Reading(known=pieces_of_text or _last_name(node.node) in _SEQUENCES)
