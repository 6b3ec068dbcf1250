"""The annotation page in a real browser."""

import json

import pytest
from annotation_page import KEY_OF, attempt, chromium, fill, press, prompt_task, running_page, vote_by_taste, wait_ready
from payloads import PAYLOADS

from prefloop.feedback.votes import all_votes, standing_votes
from prefloop.records import Message, Role, Status, ToolCall, Verdict
from prefloop.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as store:
        yield store


@pytest.fixture(scope="module")
def browser_context():
    with chromium(viewport={"width": 1280, "height": 800}) as context:
        yield context


@pytest.fixture
def page(browser_context):
    page = browser_context.new_page()
    page.troubles = []
    page.on("console", lambda message: page.troubles.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    yield page
    page.close()


def preferred(comparison):
    return comparison.trajectory_a if comparison.verdict is Verdict.A else comparison.trajectory_b


def wait_voted(page, num):
    # A function, not an expression: the page's policy does not let a string be run.
    page.wait_for_function("num => document.getElementById('num-voted').textContent === num", arg=str(num))


def side_of(vote):
    """What was chosen on the screen."""
    if vote.verdict not in (Verdict.A, Verdict.B):
        return vote.verdict.value
    return "left" if (vote.verdict is Verdict.A) == vote.a_shown_first else "right"


def test_keys_and_buttons_vote(store, page):
    fill(store, num_tasks=20)
    with running_page(store) as server:
        page.goto(server.url)
        for key in ("a", "A", "1", "ArrowLeft", "b", "2", "ArrowRight", "t", "0", "x", "s"):
            press(page, key)
        for choice in KEY_OF:
            wait_ready(page)
            before = page.get_attribute("#pair", "data-pair")
            page.click(f"button[data-choice={choice}]")
            page.wait_for_function("before => document.getElementById('pair').dataset.pair !== before", arg=before)
    votes = standing_votes(store)
    assert [side_of(vote) for vote in votes] == ["left"] * 4 + ["right"] * 3 + ["tie"] * 2 + [
        "both_bad",
        "skip",
        *KEY_OF,
    ]
    assert all(0.0 < v.seconds < 60.0 and 0.0 < v.propensity <= 1.0 for v in votes)
    assert page.troubles == []


def test_undo_brings_the_pair_back(store, page):
    fill(store, num_tasks=3)
    with running_page(store) as server:
        page.goto(server.url)
        wait_ready(page)
        first = page.get_attribute("#pair", "data-pair")
        press(page, "a")
        for key in ("u", "Backspace"):
            press(page, key)
            assert page.get_attribute("#pair", "data-pair") == first
            press(page, "b")
    assert [v.comparison.status for v in all_votes(store)] == [Status.OK, Status.WITHDRAWN] * 2 + [Status.OK]
    assert len(standing_votes(store)) == 1
    assert page.troubles == []


def test_held_and_combined_keys_and_the_help_do_not_vote(store, page):
    fill(store, num_tasks=5)
    with running_page(store) as server:
        page.goto(server.url)
        wait_ready(page)
        page.keyboard.press("Control+a")
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("a")
        page.keyboard.press("?")
        assert not page.is_visible("#help")
        page.keyboard.down("a")
        for _ in range(5):
            page.keyboard.down("a")  # what a held key repeats
        page.keyboard.up("a")
        wait_voted(page, 1)
        wait_ready(page)
    assert len(all_votes(store)) == 1


def test_a_vote_survives_a_lost_network(store, page):
    """The request is lost, then the answer is lost, then both arrive: one row."""
    fill(store, num_tasks=2)
    keys, faults = [], ["request", "answer", "server error"]

    def lose(route):
        keys.append(route.request.post_data_json["key"])
        fault = faults.pop(0) if faults else None
        if fault == "request":
            route.abort("internetdisconnected")
        elif fault == "answer":
            route.fetch()
            route.abort("connectionreset")
        elif fault == "server error":
            route.fulfill(status=503, json={"error": "the disk is full"})
        else:
            route.continue_()

    with running_page(store) as server:
        page.route("**/votes", lose)
        page.goto(server.url)
        wait_ready(page)
        page.keyboard.press("a")
        page.wait_for_selector("body[data-state=unsaved]")
        assert page.inner_text("#status") == "Not saved – retrying"
        page.keyboard.press("b")  # not a second vote
        wait_voted(page, 1)
        wait_ready(page)
        assert page.inner_text("#status") == "Saved"
    assert len(keys) == 4
    assert len(set(keys)) == 1
    assert len(all_votes(store)) == 1


def test_a_vote_survives_a_closed_page(store, page):
    fill(store, num_tasks=2)
    with running_page(store) as server:
        page.route("**/votes", lambda route: route.abort())
        page.goto(server.url)
        wait_ready(page)
        shown_left = page.inner_text("section[data-side=left]")
        page.keyboard.press("a")
        page.wait_for_selector("body[data-state=unsaved]")
        again = page.context.new_page()
        page.close(run_before_unload=False)
        again.goto(server.url)
        wait_voted(again, 1)
        wait_ready(again)
        again.close()
    (vote,) = standing_votes(store)
    assert store.trajectories([preferred(vote)])[0].messages[-1].content in shown_left


def test_the_next_pair_is_fetched_again_after_a_lost_answer(store, page):
    fill(store, num_tasks=2)
    losses = [1, 1]
    with running_page(store) as server:
        page.goto(server.url)
        page.route("**/pair", lambda route: (losses.pop(), route.abort()) if losses else route.continue_())
        press(page, "a")
        press(page, "b")
    assert len(standing_votes(store)) == 2


def test_a_vote_in_another_tab_is_told(store, page):
    fill(store, num_tasks=3)
    with running_page(store) as server:
        other = page.context.new_page()
        for tab in (page, other):
            tab.goto(server.url)
            wait_ready(tab)
        press(page, "a")
        other.keyboard.press("b")
        other.wait_for_selector("#status[data-outcome=refused]")
        assert "already" in other.inner_text("#status")
        wait_ready(other)
        press(other, "b")
        other.close()
    assert len(standing_votes(store)) == 2


def payload_attempts(task, texts):
    """Two attempts that say all texts in all places."""
    for i in range(2):
        said = [
            Message(
                Role.ASSISTANT, f"{text} {i}", reasoning_content=text,
                tool_calls=(ToolCall(text, {text: f"{text}{i}"}), ToolCall("malformed", f"{text}{i}")),
            )
            for text in texts
        ]  # fmt: skip
        results = [Message(Role.TOOL, json.dumps([{text: text, "i": i}])) for text in texts]
        yield attempt(task, f"t{i}", [*said, *results])


def test_payloads_do_nothing(store, page):
    task = prompt_task(0, prompt=" ".join(PAYLOADS))
    store.add_tasks([task])
    store.add_trajectories(payload_attempts(task, PAYLOADS))
    requests, dialogs = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.add_init_script(
        "window.violations = [];"
        "addEventListener('securitypolicyviolation', event => window.violations.push(event.blockedURI));"
    )
    with running_page(store, rater=PAYLOADS[0]) as server:
        page.goto(server.url)
        wait_ready(page)
        page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
        page.mouse.move(640, 400)
        page.mouse.wheel(0, 5000)
        page.wait_for_timeout(300)
        assert page.inner_text("section[data-side=left]").count("alert(1)") > len(PAYLOADS) / 2
        assert page.evaluate("window.violations") == []
        assert page.evaluate("document.querySelectorAll('script, img, iframe, svg, style').length") == 2
        press(page, "a")  # the fragment goes through htmx as well
        press(page, "u")
        page.wait_for_timeout(300)
        assert page.evaluate("window.violations") == []
        assert [url for url in requests if not url.startswith(server.url)] == []
    assert dialogs == []
    assert page.troubles == []


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_is_legible(store, page, width, scheme):
    fill(store, num_tasks=1)
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    with running_page(store) as server:
        page.goto(server.url)
        wait_ready(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ratios = page.evaluate(CONTRASTS)
    assert min(ratios.values()) >= 4.5, ratios


# The contrast of text and background as WCAG 2.2 defines it.
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const luminance = color => {
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    const color = getComputedStyle(element).backgroundColor;
    return color === 'rgba(0, 0, 0, 0)' && element.parentElement ? background(element.parentElement) : color;
  };
  const found = {};
  for (const selector of ['.text', 'mark', '.role', '.call-name', '.arguments th', 'tr.changed td', '.letter',
                          '.votes .side-a', '.votes .side-b', '#status', '.who', '.shared h2', '.rows th']) {
    const element = document.querySelector(selector);
    const pair = [getComputedStyle(element).color, background(element)].map(luminance).sort((a, b) => b - a);
    found[selector] = (pair[0] + 0.05) / (pair[1] + 0.05);
  }
  return found;
}"""


def test_a_planted_taste_is_recorded(store, page):
    fill(store, num_tasks=6, num_attempts=3)

    def number(text):
        return int(text.split("Booked flight number ")[1].split()[0])

    with running_page(store) as server:
        page.goto(server.url)
        assert vote_by_taste(page, lambda left, right: number(left) > number(right), 100) == 18
    for vote in standing_votes(store):
        assert preferred(vote) == max(vote.trajectory_a, vote.trajectory_b)  # their ids end in the number
