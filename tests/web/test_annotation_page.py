import json
import random
import re
import socket
import uuid
from html.parser import HTMLParser

import pytest
from annotation_page import attempt, booking_attempt, fill, prompt_task
from payloads import PAYLOADS

from prefloop.feedback.queue import QueueSettings
from prefloop.feedback.votes import all_votes, standing_votes
from prefloop.records import (
    Judgement,
    Message,
    PrefloopError,
    Rater,
    RaterKind,
    Role,
    Status,
    ToolCall,
    Verdict,
)
from prefloop.store import Store
from prefloop.web.app import bind_loopback, create_app, open_server, require_web, serve
from prefloop.web.guard import CONTENT_POLICY, MAX_BODY_BYTES

testclient = pytest.importorskip("starlette.testclient")

PORT = 8417
OWN = f"http://127.0.0.1:{PORT}"
FROM_PAGE = {"origin": OWN, "sec-fetch-site": "same-origin"}


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as store:
        yield store


def client_of(store, rater="tester", **settings):
    app = create_app(store, QueueSettings(**settings), rater, port=PORT)
    return testclient.TestClient(app, base_url=OWN, headers=FROM_PAGE, raise_server_exceptions=False)


@pytest.fixture
def client(store):
    fill(store, num_tasks=3)
    return client_of(store)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A page to which many requests are made that must all be refused, or change nothing."""
    with Store(str(tmp_path_factory.mktemp("guarded") / "store.db")) as store:
        fill(store, num_tasks=1)
        yield client_of(store)
        assert all_votes(store) == []


@pytest.fixture(scope="module")
def good_vote(guarded):
    """A vote that would count if it came from the page."""
    return vote_body(shown(guarded))


class Shown(HTMLParser):
    """What a browser reads of a page: tags with their attributes, and the text of each side."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.sides, self.stack = [], [], {"left": "", "right": ""}, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.stack.append(attributes.get("data-side"))

    def handle_endtag(self, tag):
        if tag == "section":
            self.stack.pop()

    def handle_data(self, data):
        self.text.append(data)
        if self.stack and self.stack[-1]:
            self.sides[self.stack[-1]] += data

    @property
    def pair(self):
        return next((a for _, a in self.tags if a.get("id") == "pair"), None)

    @property
    def last_vote(self):
        return next(a["data-last-vote"] for _, a in self.tags if a.get("id") == "progress")


def shown(client):
    response = client.get("/pair")
    assert response.status_code == 200
    return Shown(response.text)


def vote_body(page, choice="left", key=None, **other):
    pair = page.pair
    body = {"pair": pair["data-pair"], "order": pair["data-order"], "choice": choice, "seconds": 2.5}
    return {**body, "key": key or str(uuid.uuid4()), **other}


# --- who may ask -------------------------------------------------------------------------------------------------


FOREIGN_HOSTS = [
    "",
    "evil.test",
    f"evil.test:{PORT}",
    "127.0.0.1",
    "127.0.0.1:1",
    f"127.0.0.1.evil.test:{PORT}",
    f"0.0.0.0:{PORT}",
]


@pytest.mark.parametrize("path", ["/", "/pair", "/static/annotate.css", "/votes", "/undo", "/nowhere"])
@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_other_hosts_are_refused_on_every_route(guarded, path, host):
    for method in ("GET", "POST"):
        assert guarded.request(method, path, headers={"host": host}, json={}).status_code == 400


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"LOCALHOST:{PORT}", f"[::1]:{PORT}"])
def test_the_loopback_is_served(guarded, host):
    assert guarded.get("/", headers={"host": host}).status_code == 200


CROSS_SITE = [
    {"origin": "http://evil.test"},
    {"origin": "null"},
    {"origin": f"http://127.0.0.1:{PORT + 1}"},
    {"origin": f"https://127.0.0.1:{PORT}"},
    {"origin": f"http://localhost:{PORT}"},  # the page was asked for as 127.0.0.1
    {"origin": f"{OWN}.evil.test"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none"},
    {"origin": OWN, "sec-fetch-site": "cross-site"},
    {"origin": "http://evil.test", "sec-fetch-site": "same-origin"},
    {},
]


@pytest.mark.parametrize("headers", CROSS_SITE)
@pytest.mark.parametrize("path", ["/votes", "/undo", "/", "/pair", "/nowhere"])
def test_requests_of_other_sites_are_refused(guarded, good_vote, path, headers):
    stranger = testclient.TestClient(guarded.app, base_url=OWN)
    assert stranger.post(path, json=good_vote, headers=headers).status_code == 403


@pytest.mark.parametrize("headers", [{"origin": OWN}, {"sec-fetch-site": "same-origin"}, FROM_PAGE])
def test_requests_of_the_page_are_served(client, headers):
    body = vote_body(shown(client))
    page = testclient.TestClient(client.app, base_url=OWN)
    assert page.post("/votes", json=body, headers=headers).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", ["/", "/votes", "/undo", "/pair"])
def test_other_methods_are_refused(guarded, method, path):
    assert guarded.request(method, path).status_code == 405


@pytest.mark.parametrize("path", ["/votes", "/undo"])
def test_votes_are_not_made_by_get(guarded, path):
    assert guarded.get(path).status_code == 405


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_bodies_must_be_json(guarded, good_vote, kind):
    body = json.dumps(good_vote)
    assert guarded.post("/votes", content=body, headers={"content-type": kind}).status_code == 415


def test_large_bodies_are_refused(guarded):
    large = b" " * (MAX_BODY_BYTES + 1)
    headers = {"content-type": "application/json"}
    assert guarded.post("/votes", content=large, headers=headers).status_code == 413
    chunks = (b" " * 1024 for _ in range(MAX_BODY_BYTES // 1024 + 1))
    assert guarded.post("/votes", content=chunks, headers=headers).status_code == 413
    assert guarded.post("/votes", content=b"{}", headers={**headers, "content-length": "9" * 30}).status_code == 413


@pytest.mark.parametrize("path", ["/", "/pair", "/static/annotate.js", "/nowhere", "/static/../app.py"])
def test_every_answer_carries_the_policy(guarded, path):
    response = guarded.get(path)
    assert response.headers["content-security-policy"] == CONTENT_POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in CONTENT_POLICY


def test_refusals_carry_the_policy_too(guarded):
    assert guarded.get("/", headers={"host": "evil.test"}).headers["content-security-policy"] == CONTENT_POLICY


def test_there_is_no_page_of_the_framework_and_no_file_outside(guarded):
    for path in ("/docs", "/redoc", "/openapi.json", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/"):
        assert guarded.get(path).status_code == 404


WRONG = [
    {"pair": "x"},
    {"pair": "../" * 10},
    {"order": "aa"},
    {"choice": "a"},
    {"choice": "both_good"},
    {"seconds": -1},
    {"seconds": 1e9},
    {"seconds": "NaN"},
    {"key": "no-uuid"},
    {"rater": "someone else"},
    {"propensity": 1.0},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_votes_are_refused_without_an_echo(guarded, good_vote, wrong):
    response = guarded.post("/votes", json=good_vote | wrong)
    assert response.status_code == 422
    assert response.json() == {"error": "the request is not one that the page sends"}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"pair":' * 1000, b"null"])
def test_broken_bodies_are_refused(guarded, content):
    response = guarded.post("/votes", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert "Traceback" not in response.text


def test_failures_of_the_store_can_be_retried(client, monkeypatch):
    body = vote_body(shown(client))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_comparisons", lambda *_: (_ for _ in ()).throw(PrefloopError("the disk is full")))
        response = client.post("/votes", json=body)
    assert (response.status_code, response.json()) == (503, {"error": "the disk is full"})
    assert client.post("/votes", json=body).status_code == 200


# --- what is shown -----------------------------------------------------------------------------------------------


def test_the_page_is_blind(store):
    task = prompt_task(0)
    store.add_tasks([task])
    trajectories = [
        booking_attempt(task, name, price=200 + 100 * i, comment="Done.")
        for i, name in enumerate(["from-checkpoint-7", "from-gpt-4o"])
    ]
    store.add_trajectories(trajectories)
    judge = Rater(RaterKind.JUDGE, "secret-judge")
    store.add_raters([judge])
    store.add_judgements(
        Judgement(t.id, judge.id, Status.OK, 0.123456, 0.123456, rationale="secret-rationale") for t in trajectories
    )
    client = client_of(store)
    for path in ("/", "/pair"):
        html = client.get(path).text
        for secret in ("secret-", "from-checkpoint-7", "from-gpt-4o", "checkpoint", "0.123456", judge.id):
            assert secret not in html


def test_the_shared_beginning_is_shown_once(client):
    page = shown(client)
    text = "".join(page.text)
    assert text.count("Book me a flight") == 1
    assert text.count("search_flights") == 1
    assert text.count("filter_results") == 2
    assert "search_flights" not in page.sides["left"] + page.sides["right"]
    assert "Booked flight number" in page.sides["left"]


def test_what_is_recorded_is_what_was_shown(store):
    fill(store, num_tasks=40)
    client = client_of(store)
    num_left_is_a = 0
    for _ in range(40):
        page = shown(client)
        client.post("/votes", json=vote_body(page, "left"))
        recorded = standing_votes(store)[-1]
        preferred = recorded.trajectory_a if recorded.verdict is Verdict.A else recorded.trajectory_b
        said = store.trajectories([preferred])[0].messages[-1].content
        assert said in " ".join(page.sides["left"].split())
        assert said not in " ".join(page.sides["right"].split())
        assert recorded.a_shown_first is (recorded.verdict is Verdict.A)
        num_left_is_a += recorded.a_shown_first
    assert 8 < num_left_is_a < 32


def test_a_vote_records_the_order_on_the_screen_even_after_a_restart_with_another_seed(store):
    fill(store, num_tasks=20)
    page = shown(client_of(store, seed=0))
    for seed in range(1, 5):
        body = vote_body(page, "right")
        other = client_of(store, rater=f"rater {seed}", seed=seed)
        assert other.post("/votes", json=body).status_code == 200
        assert standing_votes(store)[-1].a_shown_first is (page.pair["data-order"] == "ab")


def payload_attempts(task, text):
    """Two attempts that say a text in every place where a trajectory can say something."""
    for i in range(2):
        calls = (ToolCall(text, {text: f"{text}{i}"}), ToolCall("malformed", f"{text}{i}"))
        said = Message(Role.ASSISTANT, f"{text} {i}", reasoning_content=text, tool_calls=calls)
        results = [text, json.dumps([{text: text, "i": i}]), json.dumps({"deep": [[text, i]]})]
        yield attempt(task, f"t{task.seed}-{i}", [said, *(Message(Role.TOOL, result) for result in results)])


@pytest.fixture(scope="module")
def payload_pages(tmp_path_factory):
    """The page of each payload, by payload; and under None that of a harmless text."""
    texts = [None, *PAYLOADS]
    pages = {}
    with Store(str(tmp_path_factory.mktemp("payloads") / "store.db")) as store:
        tasks = [prompt_task(i, prompt=text or "harmless") for i, text in enumerate(texts)]
        store.add_tasks(tasks)
        for task, text in zip(tasks, texts, strict=True):
            store.add_trajectories(payload_attempts(task, text or "harmless"))
        client = client_of(store)
        for _ in texts:
            page = shown(client)
            client.post("/votes", json=vote_body(page, "skip"))
            number = re.search(r"\(request (\d+)\)", "".join(page.text)).group(1)
            pages[texts[int(number)]] = page
    return pages


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_are_text(payload_pages, payload):
    page = payload_pages[payload]
    assert _structure(page) == _structure(payload_pages[None])
    visible = "".join(page.text)
    assert all(word in visible for word in payload.split())


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='alert(1)"])
def test_the_name_of_the_rater_is_text(store, name):
    page = Shown(client_of(store, rater=name).get("/").text)
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == ["script", "script"]
    assert next(a["data-rater"] for tag, a in page.tags if tag == "body") == name


def _structure(page):
    """Tags and attributes of a pair, without marks of differences and what names the pair."""
    names = [tag for tag, _ in page.tags]
    pair = page.tags[names.index("article") + 1 : names.index("nav")]
    return [(tag, attributes) for tag, attributes in pair if tag != "mark"]


def test_half_a_surrogate_pair_does_not_break_the_page(store):
    task = prompt_task(0)
    store.add_tasks([task])
    half = ["\\ud800 0", "\\udfff 1"]
    store.add_trajectories(
        attempt(task, text[-1], [Message(Role.ASSISTANT, "x"), Message(Role.TOOL, f'{{"a": "{text}"}}')])
        for text in half
    )
    assert client_of(store).get("/").status_code == 200


def test_no_inline_script_or_style_is_served(client):
    page = Shown(client.get("/").text)
    assert all("style" not in a and not any(n.startswith("on") for n in a) for _, a in page.tags)
    assert [a for t, a in page.tags if t == "script" and "src" not in a] == []
    assert "style" not in {t for t, _ in page.tags}
    addresses = [a.get("src") or a.get("href") for t, a in page.tags if t in ("script", "link")]
    assert addresses
    assert all(re.fullmatch(r"/static/[\w./]+", address) for address in addresses)


def test_the_files_that_the_page_names_are_there(client):
    page = Shown(client.get("/").text)
    for address in [a.get("src") or a.get("href") for t, a in page.tags if t in ("script", "link")]:
        assert client.get(address).status_code == 200


# --- votes -------------------------------------------------------------------------------------------------------


def test_replays_in_any_order_leave_one_row_each(store):
    fill(store, num_tasks=12)
    client = client_of(store)
    sent, answers = [], {}
    draw = random.Random(0)
    for choice in ("left", "right", "tie", "both_bad", "skip") * 2:
        body = vote_body(shown(client), choice)
        answers[body["key"]] = client.post("/votes", json=body).json()
        sent += [body] * 3
    draw.shuffle(sent)
    for body in sent:
        response = client.post("/votes", json=body)
        assert (response.status_code, response.json()) == (200, answers[body["key"]])
    assert len(all_votes(store)) == 10
    assert {v.comparison.id for v in all_votes(store)} == {answer["saved"] for answer in answers.values()}


def test_a_vote_that_was_undone_is_not_revived_by_a_replay(store, client):
    body = vote_body(shown(client))
    saved = client.post("/votes", json=body).json()["saved"]
    undo = {"vote": saved, "key": str(uuid.uuid4())}
    assert client.post("/undo", json=undo).status_code == 200
    assert client.post("/votes", json=body).json() == {"saved": saved}
    assert standing_votes(store) == []


def test_undo_brings_the_pair_back(store, client):
    page = shown(client)
    assert page.last_vote == ""
    client.post("/votes", json=vote_body(page))
    after = shown(client)
    assert after.pair["data-pair"] != page.pair["data-pair"]
    undo = {"vote": after.last_vote, "key": str(uuid.uuid4())}
    assert client.post("/undo", json=undo).json() == client.post("/undo", json=undo).json()
    assert shown(client).pair == page.pair
    assert len(all_votes(store)) == 2


def test_conflicts_are_told(client):
    page = shown(client)
    client.post("/votes", json=vote_body(page, "left"))
    response = client.post("/votes", json=vote_body(page, "right"))
    assert response.status_code == 409
    assert "already" in response.json()["error"]
    assert client.post("/undo", json={"vote": "0" * 32, "key": str(uuid.uuid4())}).status_code == 409


def test_two_people_see_different_pairs(store):
    fill(store, num_tasks=2)
    ann, bob, eve = (client_of(store, rater=name) for name in ("ann", "bob", "eve"))
    assert shown(ann).pair["data-pair"] != shown(bob).pair["data-pair"]
    waiting = client_of(store, rater="eve").get("/pair").text
    assert "with others" in waiting
    assert "every 5s" in waiting
    client_pair = shown(ann)
    ann.post("/votes", json=vote_body(client_pair))
    assert shown(eve).pair is None


def test_an_empty_queue_says_what_to_do(store):
    html = client_of(store).get("/").text
    assert "nothing to compare" in html
    assert "prefloop rollout" in html


def test_the_end_says_what_to_do(client):
    for _ in range(3):
        client.post("/votes", json=vote_body(shown(client), "skip"))
    html = client.get("/").text
    assert "All done" in html
    assert "prefloop curate" in html


# --- starting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.test", "", "127.0.0.2"])
def test_other_addresses_are_refused(store, host):
    with pytest.raises(PrefloopError, match="this machine only"):
        open_server(store, QueueSettings(), "ann", host=host, port=0)


def test_a_port_in_use_is_one_clear_line(store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PrefloopError, match=rf"port {port} of 127.0.0.1 cannot be used .*--port") as caught:
            serve(store, QueueSettings(), "ann", port=port)
    assert "\n" not in str(caught.value)


def test_a_port_out_of_range_is_one_clear_line():
    with pytest.raises(PrefloopError, match="port 70000"):
        bind_loopback("127.0.0.1", 70000)


def test_a_missing_extra_is_one_exact_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else object())
    with pytest.raises(PrefloopError, match=re.escape("needs fastapi: pip install 'prefloop[web]'")):
        require_web()


def test_the_socket_is_closed_when_the_queue_cannot_be_made(store):
    with pytest.raises(PrefloopError, match="no run nope"):
        open_server(store, QueueSettings(run_id="nope"), "ann", port=0)
