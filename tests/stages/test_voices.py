"""Which adapter of which server speaks for a checkpoint."""

from __future__ import annotations

import pytest

from prefloop.clients.vllm import Adapter, VLLMSettings
from prefloop.models.load import load_policy
from prefloop.models.settings import LoraSettings
from prefloop.records import PrefloopError
from prefloop.stages.voices import PROBE, ServedVoices, describe


@pytest.fixture
def checkpoints(model, tmp_path):
    """A run's directory of checkpoints with one adapter."""
    directory = tmp_path / "runs" / "one" / "checkpoints"
    directory.mkdir(parents=True)
    load_policy(str(model), lora=LoraSettings(rank=2, alpha=4)).save(directory / "001-dpo")
    return directory


def test_a_checkpoint_speaks_as_its_adapter_from_where_the_server_sees_it(model, checkpoints, tmp_path):
    path = str(checkpoints / "001-dpo")
    here = ServedVoices(VLLMSettings(), str(model), checkpoints)
    assert here.adapter("abc", path) == Adapter("abc", path)
    assert here.adapter("base", str(model)) is None
    there = ServedVoices(VLLMSettings(checkpoints="/srv/run"), str(model), checkpoints)
    assert there.adapter("abc", path) == Adapter("abc", "/srv/run/001-dpo")


def test_a_run_that_starts_from_an_adapter_wants_its_base_on_the_server(model, checkpoints, tmp_path):
    start = checkpoints / "001-dpo"
    voices = ServedVoices(VLLMSettings(checkpoints="/srv/run"), str(start), tmp_path / "elsewhere")
    assert voices.adapter("abc", str(start)) == Adapter("abc", str(start))
    assert voices.adapter("base", str(model)) is None


def test_whole_weights_are_refused(model, checkpoints):
    load_policy(str(model)).save(checkpoints / "002-sft")
    voices = ServedVoices(VLLMSettings(), str(model), checkpoints)
    with pytest.raises(PrefloopError, match="002-sft holds whole weights, which a running vLLM server cannot take"):
        voices.adapter("abc", str(checkpoints / "002-sft"))


def test_the_probe_holds_every_control_token(model):
    base, tokenizer = describe(str(model)), load_policy(str(model)).tokenizer
    assert base.name == str(model) and base.directory == model and base.text.startswith(PROBE)
    control = set(tokenizer.get_added_vocab().values())
    assert control and control <= set(base.token_ids)
    assert tokenizer.decode(base.token_ids) == base.text
