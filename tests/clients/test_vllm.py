"""The client of vLLM against a faithful fake on loopback: what is sampled is what a forward pass says."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fakes.vllm_server import FakeVLLM
from fit_runs import tiny_model
from prefloop.clients.sampling import SamplingSettings
from prefloop.clients.vllm import Adapter, BaseModel, VLLMRetrySettings, VLLMServer, VLLMSettings
from prefloop.config import parse_settings
from prefloop.models.load import load_policy
from prefloop.models.sampler import LocalSampler
from prefloop.models.settings import LoraSettings
from prefloop.records import PrefloopError

pytest.importorskip("openai")

QUICK = VLLMRetrySettings(num_attempts=4, base_wait_s=0.01, max_wait_s=0.05, timeout_s=5.0, deadline_s=20.0)
CONTEXTS = [[5, 9, 11], [7, 3, 8, 20, 33], [12]]
STOPS = [0, 1, 2, 40, 41, 42]
TEXT = "Say it in words."
TWELVE = SamplingSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose distributions are peaked enough that an error shows."""
    path = tiny_model(tmp_path_factory.mktemp("vllm"), max_length=128)
    policy = load_policy(str(path))
    torch.manual_seed(0)
    for weight in policy.model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    policy.save(path)
    return path


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two adapters that change what the model says."""
    found = []
    for seed in (1, 2):
        policy = load_policy(str(model), lora=LoraSettings(rank=4, alpha=8, seed=seed))
        torch.manual_seed(seed)
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        path = tmp_path_factory.mktemp("adapters") / f"{seed:03d}"
        policy.save(path)
        found.append(Adapter(f"checkpoint-{seed}", str(path)))
    return found


@contextmanager
def connected(fake: FakeVLLM, *, own: str = "", before_wake=lambda: None, **settings):
    """A client of a fake."""
    retry = settings.pop("retry", QUICK)
    base = base_of(fake.flags.model)
    server = VLLMServer(VLLMSettings(base_url=fake.url, retry=retry, **settings), base, own, before_wake)
    try:
        yield server
    finally:
        server.close()
        assert not fake.unknown_fields


def base_of(model: Path, text: str = TEXT) -> BaseModel:
    tokenizer = load_policy(str(model)).tokenizer
    return BaseModel(str(model), model, text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def sample(server, settings=TWELVE, seed=3, adapter=None, contexts=CONTEXTS, **more):
    keys = more.pop("row_keys", list(range(len(contexts))))
    return server.sampler(STOPS, adapter).session().generate(contexts, keys, settings, seed, **more)


def forward_logprobs(path: str, context, sampled, settings):
    """The log-probs of sampled tokens by a forward pass over the whole row, after temperature and truncation."""
    row = torch.tensor([[*context, *sampled.token.tolist()]])
    with torch.no_grad():
        logits = load_policy(path).model(input_ids=row).logits[0, len(context) - 1 : -1].double()
    steps = (logits / settings.temperature).softmax(-1).numpy()
    return np.array(
        [nucleus_logprob(step, token, settings.top_p) for step, token in zip(steps, sampled.token, strict=True)]
    )


def nucleus_logprob(probability, token, top_p):
    """The log-prob of a token among the fewest likeliest whose probability reaches `top_p`."""
    order = np.argsort(-probability)
    num = int(np.searchsorted(np.cumsum(probability[order]), top_p - 1e-12)) + 1
    kept = order[:num].tolist()
    return np.log(probability[token] / probability[kept].sum()) if token in kept else -np.inf


# --- what is sampled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_logprobs_are_those_of_a_forward_pass(model, adapters, temperature, top_p):
    settings = SamplingSettings(temperature=temperature, top_p=top_p, max_new_tokens=12)
    with FakeVLLM(model) as fake, connected(fake) as server:
        for adapter, path in ((None, str(model)), (adapters[0], adapters[0].path)):
            for context, one in zip(CONTEXTS, sample(server, settings, adapter=adapter), strict=True):
                assert one.token.dtype == np.int32 and one.logprob.dtype == np.float32
                expected = forward_logprobs(path, context, one, settings)
                np.testing.assert_allclose(one.logprob, expected, atol=1e-5)
                assert (one.stopped == "stop") == (one.token[-1] in STOPS)
                assert not set(one.token[:-1].tolist()) & set(STOPS)
                assert len(one.token) == 12 or one.stopped == "stop"


def test_greedy_tokens_are_the_local_samplers(model):
    settings = SamplingSettings(temperature=0.0, max_new_tokens=10)
    local = LocalSampler(load_policy(str(model)).model, STOPS)
    expected = local.session().generate(CONTEXTS, [0, 1, 2], settings, 0)
    with FakeVLLM(model) as fake, connected(fake) as server:
        found = sample(server, settings)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.token, two.token)
        np.testing.assert_array_equal(one.logprob, two.logprob)
        assert one.stopped == two.stopped


def test_draws_depend_on_seed_row_and_position_alone(model):
    settings = SamplingSettings(max_new_tokens=8)
    with FakeVLLM(model) as fake, connected(fake) as server:
        first, again = sample(server, settings), sample(server, settings)
        turned = sample(server, settings, contexts=CONTEXTS[::-1], row_keys=[2, 1, 0])[::-1]
        seeded = sample(server, settings, seed=[3, 4, 3])
        other_key = sample(server, settings, row_keys=[9, 1, 2])
    for one, two, three in zip(first, again, turned, strict=True):
        np.testing.assert_array_equal(one.token, two.token)
        np.testing.assert_array_equal(one.token, three.token)
    same = [np.array_equal(one.token, two.token) for one, two in zip(first, seeded, strict=True)]
    assert same == [True, False, True]
    assert not np.array_equal(first[0].token, other_key[0].token)


def test_budgets_and_the_longest_context_bound_a_turn(model):
    with FakeVLLM(model, max_model_len=16) as fake, connected(fake) as server:
        contexts = [[5] * 15, [5] * 16, [5] * 40, [5, 9]]
        long = SamplingSettings(max_new_tokens=64)
        found = server.sampler([77]).session().generate(contexts, [0, 1, 2, 3], long, 0, budgets=[9, 9, 9, 3])
        asked = [body["max_tokens"] for body in fake.bodies("/v1/completions") if "allowed_token_ids" not in body]
    assert [len(one.token) for one in found] == [1, 0, 0, 3]
    assert [one.stopped for one in found] == ["length"] * 4
    assert sorted(asked) == [1, 3]


def test_a_models_generation_config_changes_nothing(model):
    with FakeVLLM(model) as plain, connected(plain) as server:
        expected = sample(server)
    defaults = {"temperature": 0.1, "top_k": 1, "top_p": 0.1}
    with FakeVLLM(model, generation_config=defaults) as fake, connected(fake) as server:
        found = sample(server)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.token, two.token)
        np.testing.assert_array_equal(one.logprob, two.logprob)


def test_the_templates_end_tokens_end_a_turn_and_no_others(model):
    with FakeVLLM(model) as fake, connected(fake) as server:
        session = server.sampler([77]).session()
        (long,) = session.generate([[5, 9]], [0], TWELVE, 0)
        assert len(long.token) == 12
        fake.eos_token_id = int(long.token[4])
        (again,) = session.generate([[5, 9]], [0], TWELVE, 0)
    np.testing.assert_array_equal(long.token, again.token)


def test_rows_that_do_not_fit_and_temperatures_that_vllm_changes_are_refused(model):
    with FakeVLLM(model) as fake, connected(fake) as server:
        session = server.sampler(STOPS).session()
        with pytest.raises(PrefloopError, match="row_keys repeat"):
            session.generate([[1], [2]], [0, 0], SamplingSettings(), 0)
        with pytest.raises(PrefloopError, match=r"vLLM raises temperature 0\.005 to 0\.01"):
            session.generate([[1]], [0], SamplingSettings(temperature=0.005), 0)
        with pytest.raises(PrefloopError, match="stop_ids are empty"):
            server.sampler([])
        assert not fake.requests


# --- how the server was started ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logits"])
def test_other_than_processed_logprobs_are_found_out(model, mode):
    raises = pytest.raises(PrefloopError, match=r"vLLM 0\.33\.0 at http.*--logprobs-mode processed_logprobs")
    with FakeVLLM(model, logprobs_mode=mode) as fake, connected(fake) as server, raises:
        server.check()


def test_another_model_is_refused(model, tmp_path):
    with FakeVLLM(model, served_name="policy") as fake:
        with connected(fake) as server:
            server.check()  # found by its directory
        with connected(fake, model="policy") as server:
            server.check()
        with connected(fake, model="other") as server, pytest.raises(PrefloopError, match=r"serves 'policy'.*'other'"):
            server.check()
        fake.flags.model = tmp_path
        base = BaseModel("org/wanted", model, TEXT, (1, 2))
        server = VLLMServer(VLLMSettings(base_url=fake.url, retry=QUICK), base)
        with pytest.raises(PrefloopError, match="not 'org/wanted': run `vllm serve org/wanted`"):
            server.check()
        server.close()


def test_another_tokenizer_is_refused(model):
    base = base_of(model)
    changed = BaseModel(base.name, base.directory, base.text, (*base.token_ids, 7))
    with FakeVLLM(model) as fake:
        server = VLLMServer(VLLMSettings(base_url=fake.url, retry=QUICK), changed)
        with pytest.raises(PrefloopError, match=r"encodes 'Say it in words\.' as .* the run's tokenizer as .* 7\]"):
            server.check()
        server.close()


def test_nobody_there_and_a_wrong_key(model, monkeypatch):
    with FakeVLLM(model, api_key="secret") as fake:
        with connected(fake) as server, pytest.raises(PrefloopError, match="HTTP 401"):
            server.check()
        monkeypatch.setenv("VLLM_KEY", "secret")
        with connected(fake, key_variable="VLLM_KEY") as server:
            server.check()
    with connected(fake) as server, pytest.raises(PrefloopError, match=r"the connection failed.*docs/vllm\.md"):
        server.check()


def test_a_server_without_token_ids_is_refused(model):
    raises = pytest.raises(PrefloopError, match=r"no token ids \(`token_ids` is None\): vLLM 0\.10\.2")
    with FakeVLLM(model, returns_token_ids=False) as fake, connected(fake) as server, raises:
        sample(server)


def spoiled(change):
    def spoil(answer):
        if answer["choices"][0]["prompt_logprobs"] is None:  # not the probe's
            change(answer["choices"][0])

    return spoil


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["logprobs"]["token_logprobs"].pop(), "no log-prob for each of"),
        (
            lambda c: c["logprobs"]["tokens"].reverse() or c["logprobs"]["tokens"].append("token_id:1"),
            "no log-prob for",
        ),
        (lambda c: c.update(logprobs=None), "no log-prob for each of"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, -9999.0), "no sampled token can have"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, 0.5), "no sampled token can have"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None), "no sampled token can have"),
        (lambda c: c["prompt_token_ids"].insert(0, 1), "continued another prompt"),
        (lambda c: c.update(token_ids=[]), "gave 0 tokens where 1 to 12"),
        (lambda c: c.update(finish_reason="repetition"), "finish_reason 'repetition'"),
        (lambda c: c.update(finish_reason="stop"), "does not end a turn: start it with --generation-config vllm"),
    ],
)
def test_replies_that_do_not_fit_are_refused(model, change, says):
    with FakeVLLM(model) as fake, connected(fake) as server:
        fake.spoil = spoiled(change)
        with pytest.raises(PrefloopError, match=says):
            server.sampler([77]).session().generate([[5, 9]], [0], SamplingSettings(max_new_tokens=12), 0)


def test_a_turn_cut_off_early_is_refused(model):
    def cut(choice):
        choice["token_ids"] = choice["token_ids"][:3]
        choice["logprobs"] = {key: value[:3] for key, value in choice["logprobs"].items()}

    with FakeVLLM(model) as fake, connected(fake) as server:
        fake.spoil = spoiled(cut)
        with pytest.raises(PrefloopError, match="cut a turn off after 3 of 12 tokens"):
            server.sampler([77]).session().generate([[5, 9]], [0], SamplingSettings(max_new_tokens=12), 0)


# --- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_takes_the_place_of_the_runs_last_one(model, adapters, tmp_path):
    first, second = adapters
    with FakeVLLM(model) as fake, connected(fake, own=str(Path(first.path).parent.parent)) as server:
        fake.adapters["somebody-elses"] = "/elsewhere/adapter"
        one, two = sample(server, adapter=first), sample(server, adapter=second)
        assert set(fake.adapters) == {second.name, "somebody-elses"}
        assert fake.paths().count("/v1/load_lora_adapter") == 2
        again = sample(server, adapter=second)
        assert fake.paths().count("/v1/load_lora_adapter") == 2
    assert any(not np.array_equal(a.logprob, b.logprob) for a, b in zip(one, two, strict=True))
    assert all(np.array_equal(a.token, b.token) for a, b in zip(two, again, strict=True))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"runtime_lora": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"max_lora_rank": 2}, "LoRA rank 4 is greater than max_lora_rank 2.*--max-lora-rank"),
    ],
)
def test_an_adapter_that_is_not_loaded_says_what_is_needed(model, adapters, flags, says):
    raises = pytest.raises(PrefloopError, match=says)
    with FakeVLLM(model, **flags) as fake, connected(fake) as server, raises:
        server.check(adapters[0])


def test_an_adapter_that_the_server_does_not_see(model, tmp_path):
    raises = pytest.raises(PrefloopError, match=r"No adapter found for .*policy\.vllm\.checkpoints")
    with FakeVLLM(model) as fake, connected(fake) as server, raises:
        server.check(Adapter("lost", str(tmp_path)))


# --- what goes wrong on the way -----------------------------------------------------------------------------------


def test_failures_that_pass_change_nothing(model):
    with FakeVLLM(model) as fake, connected(fake) as server:
        expected = sample(server)
        before = len(fake.bodies("/v1/completions"))
        fake.faults = ["drop", 503, "abort", 500, 429]
        found = sample(server)
        probes = [b for b in fake.bodies("/v1/completions")[before:] if "allowed_token_ids" in b]
        rows = len(fake.bodies("/v1/completions")) - before - len(probes)
    assert len(found) == 3
    assert 3 < rows <= 3 + 5  # each row once, and once more for each of its failures
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.token, two.token)


def test_failures_that_last_end_with_what_came_back(model):
    with FakeVLLM(model) as fake, connected(fake) as server:
        sample(server)
        fake.faults = [500] * 1000
        with pytest.raises(PrefloopError, match=r"vLLM 0\.33\.0 at .*HTTP 500.*a fault of the test"):
            sample(server)


def test_a_server_that_was_started_again_gets_its_adapter_again(model, adapters):
    with FakeVLLM(model) as fake, connected(fake) as server:
        session = server.sampler(STOPS, adapters[0]).session()
        settings = SamplingSettings(max_new_tokens=6)
        expected = session.generate(CONTEXTS, [0, 1, 2], settings, 0)
        fake.restart()
        found = session.generate(CONTEXTS, [0, 1, 2], settings, 0)
        assert set(fake.adapters) == {adapters[0].name}
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.token, two.token)
        fake.restart(logprobs_mode="raw_logprobs")
        with pytest.raises(PrefloopError, match="--logprobs-mode processed_logprobs"):
            session.generate(CONTEXTS, [0, 1, 2], settings, 0)


def test_requests_are_many_at_once_but_no_more_than_allowed(model):
    contexts = [[5 + i] for i in range(24)]
    with FakeVLLM(model) as fake, connected(fake, num_parallel=3) as server:
        session = server.sampler(STOPS).session()
        results = {}

        def turn(name):
            results[name] = session.generate(contexts, list(range(24)), SamplingSettings(max_new_tokens=3), name)

        threads = [threading.Thread(target=turn, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = session.generate(contexts, list(range(24)), SamplingSettings(max_new_tokens=3), 1)
        assert 2 <= fake.most_open <= 3
    assert sorted(results) == [0, 1, 2]
    assert all(np.array_equal(a.token, b.token) for a, b in zip(alone, results[1], strict=True))


# --- sleep --------------------------------------------------------------------------------------------------------


def test_it_sleeps_and_wakes_when_it_is_asked_to_sample(model, adapters):
    woken = []
    with FakeVLLM(model) as fake, connected(fake, before_wake=lambda: woken.append(fake.sleeping)) as server:
        expected = sample(server, adapter=adapters[0])
        server.sleep()
        server.sleep()
        assert fake.sleeping and fake.paths().count("/sleep") == 1
        found = sample(server, adapter=adapters[0])
        assert woken == [True] and not fake.sleeping
        fake._sleep(1)  # somebody else's doing
        server.check()
        assert woken == [True, True] and not fake.sleeping
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.logprob, two.logprob)


def test_a_request_that_a_sleeping_server_holds_back_is_made_again(model):
    short = QUICK.model_copy(update={"timeout_s": 0.5})
    with FakeVLLM(model) as fake, connected(fake, retry=short) as server:
        expected = sample(server)
        fake._sleep(1)  # less than STATE_S after the last look
        found = sample(server)
        assert not fake.sleeping
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.token, two.token)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"dev_mode": False}, "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or set policy.vllm.sleep to false"),
        ({"sleep_mode": False}, "would sleep and keep the GPU's memory: start it with --enable-sleep-mode"),
    ],
)
def test_a_server_that_cannot_sleep_says_so(model, flags, says):
    with FakeVLLM(model, **flags) as fake, connected(fake) as server:
        sample(server)  # which needs none of it
        with pytest.raises(PrefloopError, match=says):
            server.sleep()


def test_weights_that_sleeping_changed_are_found_out(model):
    with FakeVLLM(model) as fake, connected(fake) as server:
        sample(server)
        server.sleep()
        fake.corrupt_on_wake = True
        with pytest.raises(PrefloopError, match="other log-probs of the same prompt than before it slept"):
            sample(server)


# --- settings -----------------------------------------------------------------------------------------------------


def test_addresses_are_checked():
    assert VLLMSettings(base_url="http://10.0.0.2:8000/").base_url == "http://10.0.0.2:8000"
    with pytest.raises(ValidationError, match="the server's root, without /v1"):
        VLLMSettings(base_url="http://127.0.0.1:8000/v1/")
    with pytest.raises(PrefloopError, match=r"test: base_url should be a base URL that begins with http"):
        parse_settings(VLLMSettings, {"base_url": "127.0.0.1:8000"}, "test")
