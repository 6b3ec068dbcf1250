import io
import re
import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from hub_fixture import hub_of
from prefloop import doctor
from prefloop.cli import main
from prefloop.doctor import examine
from prefloop.models.settings import PolicySettings
from prefloop.records import Checkpoint, Dataset, Pair
from prefloop.store import Store
from prefloop.training.checkpoint import save_atomically
from reward_examples import saved_policy
from store_records import TASK, fill, judgement


def examined(store: object, model: str = "", **policy: object) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=300)
    healthy = examine(str(store), PolicySettings(model=model, **policy) if model else None, console)
    return healthy, console.file.getvalue()


@pytest.fixture(autouse=True)
def _no_models(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Templates need seconds to import what reads them: only the tests of templates look at them."""
    monkeypatch.setattr(doctor, "_devices", lambda: iter(()))
    if "model" not in request.node.name:
        monkeypatch.setattr(doctor, "_templates", lambda model: iter(()))


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    path = tmp_path / "s.db"
    with Store(str(path)) as store:
        fill(store, "a", "b")
        store.add_judgements([judgement("a", 0.9), judgement("b", 0.1)])
        store.add_dataset(Dataset({"curation": {}}, (Pair(TASK.id, "a", "b", 0.8),)))
        saved = tmp_path / "checkpoints" / "c0"
        saved.parent.mkdir()
        manifest = save_atomically(saved, lambda directory: (directory / "w.bin").write_bytes(b"weights") and None)
        store.add_checkpoint(Checkpoint("c0", str(saved), manifest, "dpo"))
    return path


def test_no_store_yet_is_no_fault_and_makes_none(tmp_path: Path):
    healthy, text = examined(tmp_path / "none.db")
    assert healthy
    assert "– " in text
    assert "none yet" in text
    assert not (tmp_path / "none.db").exists()


def test_a_whole_store(store_path: Path):
    healthy, text = examined(store_path)
    assert healthy
    assert "✗" not in text
    for expected in ("2 trajectory", "2 judgement", "1 whole", "1 frozen", f"SQLite {sqlite3.sqlite_version}"):
        assert expected in text


def test_a_damaged_checkpoint_is_named(store_path: Path):
    weights = store_path.parent / "checkpoints" / "c0" / "w.bin"
    weights.write_bytes(b"weighty")
    healthy, text = examined(store_path)
    assert not healthy
    assert "file w.bin is damaged" in text
    assert "0 whole" in text


def test_a_checkpoint_that_is_gone_is_named(store_path: Path):
    (store_path.parent / "checkpoints" / "c0").rename(store_path.parent / "elsewhere")
    healthy, text = examined(store_path)
    assert not healthy
    assert "there is no checkpoint at" in text


def test_a_dataset_that_was_changed_is_named(store_path: Path):
    with sqlite3.connect(store_path) as connection:
        connection.execute("UPDATE dataset_member SET gap = 0.5")
    healthy, text = examined(store_path)
    assert not healthy
    assert "is damaged: its members hash to" in text


def test_a_reference_to_nothing_is_named(store_path: Path):
    with sqlite3.connect(store_path) as connection:
        connection.execute("DELETE FROM trajectory WHERE id = 'b'")
    healthy, text = examined(store_path)
    assert not healthy
    assert "refers to a missing row of trajectory" in text


def test_a_store_with_overwritten_pages(store_path: Path):
    content = bytearray(store_path.read_bytes())
    content[4096 : len(content)] = b"\x5a" * (len(content) - 4096)
    store_path.write_bytes(content)
    healthy, text = examined(store_path)
    assert not healthy
    assert "✗" in text


def test_a_file_that_is_no_store(tmp_path: Path):
    (tmp_path / "s.db").write_text("not a database at all, only text " * 100)
    healthy, text = examined(tmp_path / "s.db")
    assert not healthy
    assert "is not a prefloop store" in text


def test_a_missing_extra_is_no_fault_and_says_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    installed = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda name: None if name in ("matplotlib", "openai") else installed(name)
    )
    healthy, text = examined(tmp_path / "none.db")
    assert healthy
    assert "pip install 'prefloop[report]' (missing: matplotlib)" in text
    assert "pip install 'prefloop[openai]' (missing: openai)" in text
    assert "pip install 'prefloop[parquet]'" not in text


def test_a_missing_package_of_the_base_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "scipy" else installed(name))
    healthy, text = examined(tmp_path / "none.db")
    assert not healthy
    assert "missing: scipy" in text


def test_every_extra_for_users_is_looked_at():
    declared = set(doctor._requirements()) - {"", "all", "dev", "docs", "oracle"}
    assert declared == set(doctor.EXTRAS)


def test_keys_are_named_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-very-secret-1234")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    healthy, text = examined(tmp_path / "none.db")
    assert healthy
    assert "secret" not in text
    assert "1234" not in text
    assert "✓  ANTHROPIC_API_KEY  is set" in text
    assert "–  OPENAI_API_KEY     is not set" in text


# --- models -----------------------------------------------------------------------------------------------------


def save_tokenizer(directory: Path, template: str | None) -> str:
    from prefloop.models.initial import train_tokenizer

    tokenizer = train_tokenizer([((doctor._QUESTION, doctor._ANSWER), ())], 400)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_the_built_in_model(tmp_path: Path):
    healthy, text = examined(tmp_path / "none.db")
    assert healthy
    assert "tool calls go in and read back (format hermes)" in text
    assert "one token path" in text


def test_a_model_without_a_template(tmp_path: Path):
    model = save_tokenizer(tmp_path / "m", None)
    healthy, text = examined(tmp_path / "none.db", model)
    assert not healthy
    assert f"✗  {model}" in text
    assert "chat template" in text


def test_a_model_whose_template_has_no_tools(tmp_path: Path):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    healthy, text = examined(tmp_path / "none.db", save_tokenizer(tmp_path / "m", template))
    assert healthy
    assert "no tools: " in text
    assert "no reasoning: the template leaves it out" in text


def test_a_model_whose_calls_no_format_reads(tmp_path: Path):
    template = "{{ (tools or []) | tojson }}{% for m in messages %}{{ m.reasoning_content }}"
    template += (
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{{ c.function.arguments | tojson }}{% endfor %}"
    )
    template += "{{ m.content }}{{ eos_token }}{% endfor %}"
    healthy, text = examined(tmp_path / "none.db", save_tokenizer(tmp_path / "m", template))
    assert healthy
    assert "a turn is its reasoning and its answer" in text
    assert "no tool format reads them back: give the tokenizer a response_template, or set policy.tool_format" in text


def test_a_model_is_looked_at_as_the_run_file_lets_it_speak(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ note }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    model = save_tokenizer(tmp_path / "m", template)
    bare, noted = (
        int(re.search(r"m +renders a prompt of (\d+) tokens", examined(tmp_path / "none.db", model, **given)[1])[1])
        for given in ({}, {"template_variables": {"note": "Herons wade in cold water."}})
    )
    assert noted > bare
    assert main(["doctor", "--model", model, "--set", "policy.tool_format=?"]) == 1
    assert "policy: tool_format should be 'auto', " in capsys.readouterr().err
    assert main(["doctor", "--set", "train.beta=1"]) == 1
    assert "doctor looks at keys of policy alone" in capsys.readouterr().err


def test_a_model_of_the_hub_has_its_name_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with hub_of(tmp_path / "cache", monkeypatch) as hub:
        directory = Path(saved_policy(tmp_path / "tiny"))
        hub.add("org/tiny", directory)
        assert examined(tmp_path / "none.db", "org/tiny@main")[0]
        healthy, text = examined(tmp_path / "none.db", "org/tiny@v9")
        assert not healthy and "org/tiny has no revision 'v9'" in text


def test_a_model_whose_template_refuses_answers(tmp_path: Path):
    template = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users speak') }}{% endif %}"
    template += "{{ m.content }}{% endfor %}"
    healthy, text = examined(tmp_path / "none.db", save_tokenizer(tmp_path / "m", template))
    assert not healthy
    assert "only users speak" in text


def test_a_model_that_is_not_there(tmp_path: Path):
    healthy, text = examined(tmp_path / "none.db", str(tmp_path / "nowhere"))
    assert not healthy
    assert "cannot be loaded: there is no such directory" in text


def test_a_model_whose_tokenizer_is_damaged(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    healthy, text = examined(tmp_path / "none.db", str(tmp_path))
    assert not healthy
    assert "its tokenizer cannot be loaded: a file of it seems to be damaged: KeyError: 'added_tokens'" in text


def test_a_model_asked_for_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "transformers" else "1")
    healthy, text = examined(tmp_path / "none.db", "some/model")
    assert not healthy
    assert "needs pip install 'prefloop[train]'" in text
