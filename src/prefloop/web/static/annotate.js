// Keys, buttons, and votes that survive a lost network: a vote is kept here until the server says that it is saved,
// and is sent again under the same key, so that it counts once however often it arrives.
"use strict";

const KEYS = {
  a: "left", 1: "left", ArrowLeft: "left",
  b: "right", 2: "right", ArrowRight: "right",
  t: "tie", 0: "tie", x: "both_bad", s: "skip",
  u: "undo", Backspace: "undo", "?": "help",
};
const SETTLE_MS = 150; // a double press must not vote on a pair that nobody has seen
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5000;
const TIMEOUT_MS = 15000;

const body = document.body;
const stage = document.getElementById("stage");
const help = document.getElementById("help");
const status = document.getElementById("status");
const pendingName = `prefloop.unsaved.${body.dataset.rater}`;

class Refused extends Error {}

let stale = false; // whether the pair on the screen has been voted on
let seenMs = 0; // time that this pair has been visible, up to `visibleSince`
let visibleSince = null;

function setState(name, text) {
  body.dataset.state = name;
  status.textContent = text;
}

// --- time on a pair, without the time that the page was hidden -------------------------------------------------

function countTime() {
  const now = performance.now();
  if (visibleSince !== null) seenMs += now - visibleSince;
  visibleSince = document.visibilityState === "visible" ? now : null;
}

function restartTime() {
  seenMs = 0;
  visibleSince = document.visibilityState === "visible" ? performance.now() : null;
}

// --- sending ---------------------------------------------------------------------------------------------------

function pause(ms) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    addEventListener("online", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

async function retrying(attempt, waiting) {
  for (let ms = FIRST_RETRY_MS; ; ms = Math.min(2 * ms, LAST_RETRY_MS)) {
    try {
      return await attempt();
    } catch (error) {
      if (error instanceof Refused) throw error;
      setState("unsaved", waiting);
      await pause(ms);
    }
  }
}

async function post(submission) {
  const response = await fetch(submission.url, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(submission.body),
    signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  const answer = await response.json();
  if (response.status >= 400 && response.status < 500) throw new Refused(answer.error);
  if (!response.ok || !answer.saved) throw new Error(answer.error);
}

async function submit(submission) {
  if (!navigator.locks) return deliver(submission);
  return navigator.locks.request(pendingName, () => deliver(submission));
}

async function deliver(submission) {
  localStorage.setItem(pendingName, JSON.stringify(submission));
  setState("saving", "Saving…");
  let outcome = "Saved";
  try {
    await retrying(() => post(submission), "Not saved – retrying");
  } catch (error) {
    outcome = `Not counted: ${error.message}`;
  }
  localStorage.removeItem(pendingName);
  await retrying(nextPair, `${outcome}. No connection – retrying`);
  setState("settling", outcome);
  status.dataset.outcome = outcome === "Saved" ? "saved" : "refused";
}

async function nextPair() {
  stale = true;
  await htmx.ajax("GET", "/pair", { target: "#stage", swap: "innerHTML" });
  if (stale) throw new Error("no answer");
}

function shown() {
  stale = false;
  scrollTo(0, 0);
  restartTime();
  setTimeout(() => { if (body.dataset.state !== "saving") body.dataset.state = "ready"; }, SETTLE_MS);
}

// --- what people do --------------------------------------------------------------------------------------------

function vote(choice) {
  const pair = document.getElementById("pair");
  if (!pair) return;
  countTime();
  submit({
    url: "/votes",
    body: {
      pair: pair.dataset.pair,
      order: pair.dataset.order,
      choice,
      seconds: Math.min(seenMs / 1000, 86400),
      key: crypto.randomUUID(),
    },
  });
}

function undo() {
  const last = document.getElementById("progress").dataset.lastVote;
  if (last) submit({ url: "/undo", body: { vote: last, key: crypto.randomUUID() } });
}

function toggleHelp() {
  if (help.open) help.close();
  else help.showModal();
}

function act(action) {
  if (action === "help") return toggleHelp();
  if (help.open || body.dataset.state !== "ready") return;
  if (action === "undo") undo();
  else vote(action);
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  act(action);
});

addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || button.disabled) return;
  button.blur();
  act(button.dataset.choice || button.dataset.act);
});

document.addEventListener("visibilitychange", countTime);
document.addEventListener("htmx:after:swap", shown);
addEventListener("beforeunload", (event) => { if (body.dataset.state === "unsaved") event.preventDefault(); });

const unsaved = localStorage.getItem(pendingName);
shown();
if (unsaved) submit(JSON.parse(unsaved)); // the page was closed before the server answered
