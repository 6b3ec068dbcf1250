"""The loop where nothing is verified: a language model judges, through the real client, against a fake server."""

from __future__ import annotations

import json

import pytest
from tiny_runs import tiny_run

from fakes.served import fake_server
from judge_examples import MODEL
from prefloop import cli
from prefloop.loop import run_loop
from prefloop.stages.context import BEFORE


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary-5ec7e7")


def test_a_judge_stands_for_verified_outcomes(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n} in words."}) + "\n" for n in range(60)))
    assert cli.main(["init-model", "model", "--set", "hidden_size=32", "--set", "num_heads=4"]) == 0
    with fake_server(tmp_path) as fake:
        changes = {
            "environment": {"name": "prompts", "path": str(prompts), "held_out": 0.3},
            "policy": {"model": str(tmp_path / "model")},
            "sft": None,
            "judge": {"kind": "llm", "llm": {"provider": "anthropic", "model": MODEL, "base_url": fake.url}},
            "rollout__sampling": {"max_new_tokens": 8},
            "train__learning_rate": 1e-3,
        }
        with tiny_run(iterations=1, **changes) as run:
            finished = run_loop(run)
            judged, curated, trained = (run.found(0, stage) for stage in ("judge", "curate", "train"))
            assert judged["statuses"] == {"ok": 16}
            assert judged["success"] is None
            assert curated["num_pairs"] > 0
            assert curated["pair_precision"] is None
            assert trained["checkpoint_id"] != run.checkpoint_before(0)
            (attempt,) = trained["attempts"]
            assert attempt["success"] is None  # nothing is verified, and nothing is made up
            for iteration in (BEFORE, 1):
                sampled = run.found(iteration, "evaluate")["sampled"]
                assert sampled["success"] is None
                assert 0 <= sampled["mean_judge_score"] <= 1
                assert sampled["num_unverified"] == 8
            assert finished["paired"] is None
            assert fake.num_billed == run.store.counts()["judge_call"]
