"""The whole loop with a vLLM server that samples: a fake one on loopback, the tiny model behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_runs import tiny_run, tiny_settings

from fakes.vllm_server import FakeVLLM
from prefloop.config import parse_settings
from prefloop.loop import run_loop
from prefloop.models.load import load_policy
from prefloop.records import PrefloopError, Source, Split
from prefloop.rollout import Attempt
from prefloop.stages.context import BEFORE, Progress, Run, opened
from prefloop.stages.gateway import served
from prefloop.stages.rollouts import iteration_rollouts, rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.valuing import value_stage
from prefloop.store import Store

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that has seen some demonstrations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("base"))
        with tiny_run(name="base", sft__num_demonstrations=200, sft__num_steps=60) as run, opened(run):
            checkpoint = run.store.checkpoint(start_policy(run))
            return run.directory.absolute().parent.parent / checkpoint.path


@pytest.fixture
def fake(talker):
    with FakeVLLM(talker, max_model_len=1024) as server:
        yield server
        assert not server.unknown_fields


def served_settings(model, url, **changes):
    """A small run whose policy the server at `url` samples; its large updates are kept however far they go."""
    large = {"name": "served", "train__learning_rate": 2e-2, "guard__max_kl": 1e6}
    settings = tiny_settings(**{**large, **changes})
    del settings["sft"]
    settings["policy"] = {
        "model": str(model),
        "lora": {"rank": 4, "alpha": 8},
        "vllm": {"base_url": url, "retry": {"base_wait_s": 0.01, "max_wait_s": 0.1}},
    }
    return settings


class Watch(Progress):
    """Notes whether the server slept when a stage began and ended."""

    def __init__(self, fake):
        self.fake, self.slept = fake, {}

    def advance(self, done, note=""):
        if note.startswith("loss"):
            self.slept["training"] = self.fake.sleeping

    def end(self, iteration, stage, detail):
        self.slept[stage] = self.fake.sleeping


def forward(path, token_path):
    """Log-probs of a path's sampled tokens by a plain forward pass."""
    row = torch.from_numpy(token_path.token.astype(np.int64))[None]
    with torch.no_grad():
        known = load_policy(path).model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
    own = np.flatnonzero(token_path.source == Source.SAMPLED)
    return own, np.array([float(known[i - 1, row[0, i]]) for i in own])


@pytest.mark.slow
def test_the_loop_samples_each_iteration_from_the_adapter_that_was_trained_last(talker, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_settings(RunSettings, served_settings(talker, fake.url), "test")
    with Store("runs/prefloop.db") as store:
        watch = Watch(fake)
        run = Run(settings, store, watch)
        run_loop(run)
        start, middle, end = (run.checkpoint_before(i) for i in range(3))
        assert len({start, middle, end}) == 3  # both updates were kept
        asked = [b["model"] for b in fake.bodies("/v1/completions") if "allowed_token_ids" not in b]
        assert list(dict.fromkeys(asked)) == [str(talker), middle, end]
        assert list(fake.adapters) == [end]
        assert watch.slept == dict.fromkeys(watch.slept, True) and {"training", "rollout"} <= watch.slept.keys()
        for iteration, checkpoint in ((0, str(talker)), (1, store.checkpoint(middle).path)):
            for trajectory in iteration_rollouts(run, iteration, with_paths=True)[::5]:
                for path in trajectory.token_paths:
                    own, expected = forward(checkpoint, path)
                    np.testing.assert_allclose(path.logprob[own], expected, atol=1e-4)
        own, by_start = forward(str(talker), path)
        assert np.abs(path.logprob[own] - by_start).max() > 0.01  # the adapter says something else
        assert abs(run.require(BEFORE, "evaluate")["sampled"]["kl_per_token"]) < 1e-4
        assert run.require(2, "evaluate")["sampled"]["kl_per_token"] != 0


@pytest.mark.slow
def test_a_run_goes_on_at_another_address_with_the_same_tokens(talker, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    with FakeVLLM(talker, max_model_len=1024, served_name="policy") as other:
        for name, second in (("one", fake), ("two", other)):
            with Store(f"runs/{name}.db") as store:
                changes = {"name": name, "rollout__samples_per_task": 2, "evaluation__num_tasks": 2}
                for server in (fake, second):
                    settings = parse_settings(RunSettings, served_settings(talker, server.url, **changes), "test")
                    run = Run(settings, store)
                    with opened(run):
                        start_policy(run)
                        if server is second:
                            rollout_stage(run, 0)
                found.append([t.messages for t in iteration_rollouts(run, 0)])
    assert other.bodies("/v1/completions") and found[0] == found[1]


@pytest.mark.slow
def test_steps_are_valued_by_what_the_server_samples(talker, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"rollout__num_tasks": 2, "rollout__samples_per_task": 1, "value__num_completions": 2}
    with Store("runs/prefloop.db") as store:
        run = Run(parse_settings(RunSettings, served_settings(talker, fake.url, **changes), "test"), store)
        with opened(run):
            start_policy(run)
            rollout_stage(run, 0)
            before = len(fake.bodies("/v1/completions"))
            value_stage(run, 0)
        assert len(fake.bodies("/v1/completions")) > before
        assert store.step_labels()


@pytest.mark.slow
def test_agents_of_a_gateway_speak_with_what_the_server_samples(talker, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, said = ("task", "episode"), [{"role": "user", "content": "Book me a flight to Oslo."}]
    with Store("runs/prefloop.db") as store:
        run = Run(parse_settings(RunSettings, served_settings(talker, fake.url), "test"), store)
        with opened(run):
            checkpoint, task = start_policy(run), run.environment.tasks(Split.TRAIN, 1)[0]
            with served(run, 0, checkpoint, host="127.0.0.1", port=0, token="") as (gateway, server):
                gateway.open(name, Attempt(task, 0, 0))
                at = server.environment(name)
                agent = openai.OpenAI(base_url=at["OPENAI_BASE_URL"], api_key=at["OPENAI_API_KEY"], max_retries=0)
                agent.chat.completions.create(model="any", messages=said, max_tokens=12)
                rollout = gateway.close(name)
    assert fake.sleeping
    (path,) = rollout.trajectory.token_paths
    own, expected = forward(str(talker), path)
    assert 1 <= len(own) <= 12
    np.testing.assert_allclose(path.logprob[own], expected, atol=1e-4)


@pytest.mark.slow
def test_a_run_does_not_change_between_a_server_and_here(talker, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = served_settings(talker, fake.url)
    with Store("runs/prefloop.db") as store:
        run = Run(parse_settings(RunSettings, settings, "test"), store)
        with opened(run):
            start_policy(run)
        del settings["policy"]["vllm"]
        here = Run(parse_settings(RunSettings, settings, "test"), store)
        with pytest.raises(PrefloopError, match=r"other settings \(policy\.vllm: a table → nothing\)"), opened(here):
            pass


@pytest.mark.parametrize("imitates", [False, True])
def test_a_server_with_another_model_is_said_before_anything_is_done(model, tmp_path, monkeypatch, imitates):
    monkeypatch.chdir(tmp_path)
    with FakeVLLM(model, served_name="other") as fake, Store("runs/prefloop.db") as store:
        fake.flags.model = tmp_path
        settings = served_settings(model, fake.url)
        settings |= {"sft": tiny_settings()["sft"]} if imitates else {}
        run = Run(parse_settings(RunSettings, settings, "test"), store)
        with opened(run), pytest.raises(PrefloopError, match=f"serves 'other'.*run `vllm serve {model}`"):
            start_policy(run)
        assert not store.events(run.id)


def test_whole_weights_are_not_for_a_running_server():
    settings = served_settings("org/model", "http://127.0.0.1:1")
    del settings["policy"]["lora"]
    with pytest.raises(
        PrefloopError, match="the table 'vllm' needs 'model' and a table 'lora': a running server takes"
    ):
        parse_settings(RunSettings, settings, "run.toml")
