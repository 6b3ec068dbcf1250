"""The judge against `transformers serve`: a real server, a real model, and nothing worth reading in its replies."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from judge_examples import QUICK, make_items, open_store
from prefloop.judges import judge_all
from prefloop.judges.llm import LLMJudge, LLMJudgeSettings
from prefloop.records import PrefloopError, Status
from prefloop.store.schema import judge_call

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_random_model(folder: Path) -> None:
    """A tiny Llama with random weights, and a byte-level tokenizer that was trained on next to nothing."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(['{"rationale": "", "scores": {}}'], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8192, eos_token_id=1, bos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a `transformers serve` of the random model, and the model's path."""
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


def _wait_until_up(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server is not up: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_noise_from_a_real_model_never_becomes_a_number(served, tmp_path):
    url, model = served
    said = f"{model}@main"  # what this server calls a local model
    items = make_items(*(f"Booked {n}." for n in range(6)))
    retry = QUICK.model_copy(update={"timeout_s": 120.0, "deadline_s": 240.0})
    settings = LLMJudgeSettings(
        provider="openai",
        model=model,
        returned_model=said,
        base_url=url,
        max_tokens=24,
        retry=retry,
        concurrency=2,
        num_asks=1,
    )
    with open_store(tmp_path, items) as store:
        judge = LLMJudge(settings, store)
        with pytest.raises(PrefloopError, match="failed on 6 of 6"):
            judge_all(judge, items, store)
        judgements = store.judgements()
        assert len(judgements) == 6
        assert all(j.value is None and j.score is None for j in judgements)
        assert {j.status for j in judgements} <= {Status.TRUNCATED, Status.UNPARSABLE}
        with store.reading() as connection:
            calls = list(connection.execute(judge_call.select()).mappings())
        assert {(call["state"], call["status"], call["model"]) for call in calls} == {("answered", "ok", said)}
        assert all(0 < call["output_tokens"] <= 24 for call in calls)
        with pytest.raises(PrefloopError):
            judge_all(judge, items, store)
        with store.reading() as connection:
            assert len(list(connection.execute(judge_call.select()))) == 6  # read again, not paid again
