"""A policy behind a server, through the command line: rolled out, judged, curated, exported; not trained."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prefloop.cli import main
from prefloop.environments.booking import BOOKED, CITIES
from prefloop.records import AuthorKind, Ended
from prefloop.store import Store

pytest.importorskip("openai")


class Agent(BaseHTTPRequestHandler):
    """Books as it should every second time, and invents an id otherwise."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            message = self._next(request["messages"])
        choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
        body = {"id": "c", "object": "chat.completion", "model": "expert-1", "choices": [choice]}
        payload = json.dumps(body | {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _next(self, messages):
        request, results = messages[0]["content"], [m for m in messages if m["role"] == "tool"]
        if not results:
            return self._call("search_flights", city=next(city for city in CITIES if city in request))
        last = json.loads(results[-1]["content"])
        if not isinstance(last, list):
            return {"content": BOOKED}
        if len(results) == 1:
            self.server.count += 1
            if self.server.count % 2:
                return self._call("book_flight", flight_id="XX99")
            limit = int(request.split("$")[1].split(",")[0].rstrip("."))
            return self._call("filter_results", max_price=limit, direct="direct only" in request)
        return self._call("book_flight", flight_id=last[0]["id"])

    def _call(self, name, **arguments):
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"content": None, "tool_calls": [{"id": "call-1", "type": "function", "function": function}]}

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Agent)
    server.lock, server.count = threading.Lock(), 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_served_policy_gives_pairs_but_is_not_trained(address, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(
        f'''
        name = "served"
        iterations = 1
        store = "served.db"
        [environment]
        name = "booking"
        [policy.server]
        model = "expert-1"
        base_url = "{address}"
        [rollout]
        num_tasks = 4
        samples_per_task = 4
        [train]
        learning_rate = 1e-4
        '''
    )
    for stage in ("rollout", "judge", "curate"):
        assert main([stage, "run.toml"]) == 0, capsys.readouterr().err
    assert main(["train", "run.toml"]) == 1
    assert "the weights of a served policy are not here" in capsys.readouterr().err
    assert main(["export", "pairs.jsonl", "--store", "served.db"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert rows
    with Store("served.db", must_exist=True) as store:
        trajectories = store.trajectories(author_kind=AuthorKind.REMOTE_MODEL)
        assert len(trajectories) == 16
        assert {t.ended for t in trajectories} == {Ended.DONE}
        scores = {j.trajectory_id: j.score for j in store.judgements() if "rules" in store.raters()[j.rater_id].name}
        assert sorted(scores.values()) == [0.0] * 8 + [1.0] * 8
    assert all("filter_results" in json.dumps(row["chosen"]) for row in rows)
    assert not any("filter_results" in json.dumps(row["rejected"]) for row in rows)
