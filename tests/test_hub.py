"""Models and data by name: from a hub on loopback, at a revision, from the cache when the hub is gone."""

import json
import logging
import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from fakes.hub import TOKEN, Hub
from hub_fixture import ask_again, ask_at, hub_of
from prefloop.cli import main
from prefloop.hub import choose_files, data_files, data_name, fetch_model, is_adapter, model_name, pinned_model
from prefloop.models.load import load_policy
from prefloop.models.settings import LoraSettings
from prefloop.records import PrefloopError
from prefloop.training.weights import weights_hash
from reward_examples import saved_policy

ROWS = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with hub_of(tmp_path / "cache", monkeypatch) as found:
        yield found


@pytest.fixture
def model(tmp_path: Path, hub: Hub) -> Path:
    """A model that is on the hub as org/tiny, too."""
    directory = Path(saved_policy(tmp_path / "tiny"))
    hub.add("org/tiny", directory)
    return directory


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "revision", "path"),
    [
        ("org/name", "org/name", "", ""),
        ("org/name@v1.0", "org/name", "v1.0", ""),
        ("org/name:train", "org/name", "", "train"),
        ("org/na.me-2@refs/convert/parquet:default/train", "org/na.me-2", "refs/convert/parquet", "default/train"),
        ("org/name:data/rows.jsonl", "org/name", "", "data/rows.jsonl"),
    ],
)
def test_names_of_data(text: str, repo: str, revision: str, path: str):
    found = data_name(text)
    assert found is not None
    assert (found.repo, found.revision, found.path) == (repo, revision, path)
    assert str(found) == text


@pytest.mark.parametrize("text", ["rows.jsonl", "name", "data/rows.jsonl", "./org/name", "a/b/c.parquet", "/a/b"])
def test_paths_are_no_names_of_data(text: str):
    assert data_name(text) is None


def test_what_is_here_is_meant_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert data_name("org/name") is None and model_name("org/name") is None
    assert fetch_model("org/name") == Path("org/name")
    assert pinned_model("org/name") == "org/name"


# --- models -----------------------------------------------------------------------------------------------------


def test_a_model_of_a_hub_is_the_model_and_its_name_is_pinned(hub: Hub, model: Path):
    first = hub.repositories["models", "org/tiny"].branches["main"]
    assert pinned_model("org/tiny") == f"org/tiny@{first}"
    assert weights_hash("org/tiny") == weights_hash(str(model)) == weights_hash(f"org/tiny@{first}")
    hub.add("org/tiny", {"config.json": (model / "config.json").read_bytes() + b"\n"})
    assert pinned_model("org/tiny") == f"org/tiny@{first}"  # a process asks once
    ask_again()
    assert pinned_model("org/tiny") != f"org/tiny@{first}"
    assert weights_hash(f"org/tiny@{first}") != weights_hash("org/tiny")
    assert load_policy(f"org/tiny@{first}").model.name_or_path == "org/tiny"


def test_an_adapter_names_the_repository_and_the_commit_below_it(hub: Hub, model: Path, tmp_path: Path):
    first = hub.repositories["models", "org/tiny"].branches["main"]
    policy = load_policy("org/tiny", lora=LoraSettings(rank=2))
    policy.save(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/tiny", first)
    assert "cache" not in "".join(path.read_text() for path in (tmp_path / "adapter").glob("*.json"))
    before = weights_hash(str(tmp_path / "adapter"))
    hub.add("org/tiny", {"model.safetensors": b"other"})
    ask_again()
    assert weights_hash(str(tmp_path / "adapter")) == before
    again = load_policy(str(tmp_path / "adapter"))
    assert all(a.equal(b) for a, b in zip(again.model.parameters(), policy.model.parameters(), strict=True))


def test_whether_a_name_means_an_adapter(hub: Hub, model: Path, tmp_path: Path):
    hub.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"large"})
    assert [is_adapter(name) for name in ("org/adapter", "org/tiny", str(model), "org/none", "")] == [True] + 4 * [
        False
    ]
    assert not any(one.name == "adapter_model.safetensors" for one in Path(constants.HF_HUB_CACHE).rglob("*"))


def test_only_files_of_a_model_are_fetched_and_only_once(hub: Hub, model: Path):
    hub.add("org/tiny", {"onnx/model.onnx": b"1", "pytorch_model.bin": b"2", "train.py": b"3", "original/x.json": b"4"})
    directory = fetch_model("org/tiny")
    assert {path.name for path in directory.rglob("*") if path.is_file()} == {
        ".gitattributes", *(path.name for path in model.iterdir())
    }  # fmt: skip
    hub.requests.clear()
    ask_again()
    assert fetch_model(pinned_model("org/tiny")) == directory
    assert not [asked for asked in hub.requests if "/resolve/" in asked]
    hub.requests.clear()
    assert fetch_model(f"org/tiny@{directory.name}") == directory
    assert hub.requests == []


def test_a_plan_fetches_no_weights(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = {"base_model_name_or_path": "org/tiny", "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    tokenizer = {file.name: file.read_bytes() for file in model.glob("*token*")}
    tokenizer |= {file.name: file.read_bytes() for file in model.glob("*.jinja")}
    adapter = {"adapter_config.json": json.dumps(said).encode(), "adapter_model.safetensors": b"large", **tokenizer}
    hub.add("org/adapter", adapter)
    for name in ("org/tiny", "org/adapter"):
        Path("run.toml").write_text(
            f'name = "p"\n[environment]\nname = "arithmetic"\n[policy]\nmodel = "{name}"\n[train]\n'
        )
        assert main(["plan", "run.toml", "--memory", "24"]) == 0, capsys.readouterr().err
    assert not [asked for asked in hub.requests if "/resolve/" in asked and "safetensors" in asked]
    assert weights_hash("org/tiny") == weights_hash(str(model))  # they are fetched where they are needed


def test_pickled_weights_are_fetched_where_there_are_no_others(hub: Hub):
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"1", "training_args.bin": b"2"})
    found = {path.name for path in fetch_model("org/old").iterdir()}
    assert found == {"config.json", "pytorch_model.bin", ".gitattributes"}


@pytest.mark.parametrize("gone", ["down", "offline", "no server"])
def test_where_the_hub_is_gone_the_cache_is_used_and_said(
    gone: str, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    directory = fetch_model("org/tiny")
    ask_again()
    go(gone, hub, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert fetch_model("org/tiny") == directory
    (said,) = [record.getMessage() for record in caplog.records if record.name == "prefloop.hub"]
    assert re.match(r"the hub cannot be reached \(.+\): model org/tiny is taken from the local cache, commit ", said)
    assert said.endswith(directory.name)
    with pytest.raises(PrefloopError) as caught:
        fetch_model("org/other")
    line = str(caught.value)
    assert line.startswith("model 'org/other' cannot be loaded: there is no such directory, and the hub cannot be re")
    assert "HF_ENDPOINT" in line and "hf download org/other --repo-type model --local-dir DIR" in line
    assert "\n" not in line


def go(gone: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if gone == "down":
        hub.down = True
    elif gone == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        ask_at("http://127.0.0.1:9", monkeypatch)


def test_a_download_that_was_cut_off_is_not_taken_for_a_model(hub: Hub, model: Path):
    directory = fetch_model("org/tiny")
    (directory / "model.safetensors").unlink()
    ask_again()
    hub.down = True
    with pytest.raises(PrefloopError, match=r"cannot be loaded: .*hub cannot be reached: .*model\.safetensors"):
        fetch_model("org/tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "no model org/none on the hub, or it is private: log in with `hf auth login`, or set HF_TOKEN"),
        ("org/private", "no model org/private on the hub, or it is private: log in"),
        ("org/gated", "accept the conditions on its page, and log in with"),
        ("org/tiny@v9", "org/tiny has no revision 'v9'"),
        ("org/empty", "org/empty of the hub has no config.json"),
        ("org/na me", "there is no such directory$"),
        ("", "its name is empty"),
    ],
)
def test_models_that_cannot_be_had(name: str, message: str, hub: Hub, model: Path):
    hub.add("org/private", {"config.json": b"{}"}, private=True)
    hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    hub.add("org/empty", {"notes.txt": b"nothing"})
    with pytest.raises(PrefloopError, match=message) as caught:
        fetch_model(name)
    assert "\n" not in str(caught.value)


def test_a_cache_that_is_broken_is_not_taken_for_a_hub_out_of_reach(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(PrefloopError) as caught:
        fetch_model("org/tiny")
    line = str(caught.value)
    assert line.startswith("model 'org/tiny' cannot be loaded: ") and "\n" not in line
    assert "Not a directory" in line and "cannot be reached" not in line and "HF_HOME names another" in line


def test_a_private_model_with_a_token(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add("org/private", model, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert weights_hash("org/private") == weights_hash(str(model))


# --- data -------------------------------------------------------------------------------------------------------

FILES = [
    "README.md", "dataset_infos.json", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
    "data/test-00000-of-00001-0123abcd.parquet",
]  # fmt: skip
FOLDERS = ["en/train.jsonl", "en/test.jsonl", "de/train.jsonl.gz", ".cache/x.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("files", "path", "chosen"),
    [
        (FILES, "train", FILES[2:4]),
        (FILES, "data/train", FILES[2:4]),
        (FILES, "test", FILES[4:]),
        (FILES, "data/train-00001-of-00002.parquet", FILES[3:4]),
        (FOLDERS, "en/test", ["en/test.jsonl"]),
        (FOLDERS, "de", ["de/train.jsonl.gz"]),
        (["rows.jsonl"], "", ["rows.jsonl"]),
        (FILES[:4], "", FILES[2:4]),
    ],
)
def test_one_split_is_chosen(files: list[str], path: str, chosen: list[str]):
    assert choose_files("org/data", files, path) == chosen


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (
            FILES,
            "",
            r"data 'org/data' is ambiguous: name one, such as org/data:data/test, of data/test-0.*, data/train",
        ),
        (FOLDERS, "train", r"'org/data:train' is ambiguous: .* such as org/data:de/train, of de/train.jsonl.gz, en/tr"),
        (FOLDERS, "en", r"ambiguous: .* of en/test.jsonl, en/train.jsonl$"),
        (FILES, "validation", r"nothing of it is 'validation'; it has data/test-"),
        (["README.md"], "", r"it has no files that end in \.jsonl, \.json, \.parquet"),
    ],
)
def test_several_splits_are_an_error_that_lists_them(files: list[str], path: str, message: str):
    with pytest.raises(PrefloopError, match=message):
        choose_files("org/data" + (f":{path}" if path else ""), files, path)


def test_data_of_a_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    sha = hub.add("org/data", {"train.jsonl": ROWS, "test.jsonl": ROWS * 2, "large.bin": b"0"}, "datasets")
    (found,) = data_files("org/data:train")
    assert found.path.read_bytes() == ROWS
    assert found.called == found.name == f"org/data@{sha}:train.jsonl"
    assert not [asked for asked in hub.requests if "large.bin" in asked or "test.jsonl" in asked]
    hub.add("org/data", {"train.jsonl": ROWS * 3}, "datasets")
    ask_again()
    assert data_files(f"org/data@{sha}:train")[0].path.read_bytes() == ROWS
    assert data_files("org/data:train")[0].path.read_bytes() == ROWS * 3
    ask_again()
    hub.down = True
    with caplog.at_level(logging.WARNING):
        assert data_files("org/data:train")[0].path.read_bytes() == ROWS * 3
    assert "dataset org/data is taken from the local cache" in caplog.text
    with pytest.raises(PrefloopError, match="--repo-type dataset --local-dir DIR"):
        data_files("org/data:test")


def test_data_that_is_not_there(hub: Hub):
    with pytest.raises(PrefloopError, match=r"there is no file rows\.jsonl"):
        data_files("rows.jsonl")
    with pytest.raises(PrefloopError, match="no such file, and no dataset org/none on the hub"):
        data_files("org/none:train")
