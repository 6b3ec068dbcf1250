import pytest

pytest.importorskip("transformers", reason="the extra 'train' is not installed")

from tokenizers import Tokenizer

from chat_tokenizers import TEMPLATES, TOOLS, byte_level_backend, wrap
from prefloop.chat import ChatRenderer
from prefloop.records import Message, Role, ToolCall


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    return byte_level_backend()


@pytest.fixture(scope="session")
def make_renderer(backend):
    def make(template: str = "chatml", **options) -> ChatRenderer:
        copy = Tokenizer.from_str(backend.to_str())
        return ChatRenderer(wrap(copy, TEMPLATES.get(template, template)), **options)

    return make


@pytest.fixture(scope="session")
def chatml(make_renderer) -> ChatRenderer:
    return make_renderer("chatml")


@pytest.fixture(scope="session")
def thinking(make_renderer) -> ChatRenderer:
    return make_renderer("thinking")


@pytest.fixture
def tools():
    return TOOLS


@pytest.fixture
def booking() -> list[Message]:
    call = ToolCall("search_flights", {"city": 'Os"lo', "max": 12.5, "stops": [0, True, None]})
    return [
        Message(Role.SYSTEM, "You book flights."),
        Message(Role.USER, "Fly me to Oslo."),
        Message(Role.ASSISTANT, "Let me look.", tool_calls=(call,)),
        Message(Role.TOOL, '[{"id": "F1234"}]'),
        Message(Role.ASSISTANT, "Booked F1234."),
        Message(Role.USER, "Thank you"),
        Message(Role.ASSISTANT, "Have a good trip!"),
    ]
