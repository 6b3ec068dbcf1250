"""A fake of the Anthropic Messages API, and of OpenAI's chat completions, that can fail in every way.

Run as a process of its own: `python anthropic_server.py LEDGER [SCRIPT.json]`; it prints its port and serves on
loopback until it is killed. LEDGER gets one JSON line for each request: what was asked, what the server did, and
whether it billed for it.

SCRIPT is a JSON list of rules {"match": text in the request, "do": [action, …]}: the first rule whose text is in
the body of the request acts, the n-th such request by its n-th action, the last action repeating. Without a rule,
or by the action "good", it gives a well-formed verdict whose points follow from the question.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LEDGER = sys.argv[1]
RULES = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")) if len(sys.argv) > 2 else []
LOCK = threading.Lock()
SEEN = [0] * len(RULES)
INPUT_TOKENS, OUTPUT_TOKENS = 1000, 100


def next_action(body: str) -> dict:
    for number, rule in enumerate(RULES):
        if rule["match"] in body:
            with LOCK:
                turn, SEEN[number] = SEEN[number], SEEN[number] + 1
            action = rule["do"][min(turn, len(rule["do"]) - 1)]
            return {"kind": action} if isinstance(action, str) else action
    return {"kind": "good"}


def verdict(question: str, schema: dict, salt: str) -> str:
    names = list(schema["properties"]["scores"]["properties"])
    nonce = re.findall(r"The nonce is ([0-9a-f]+)\.", question)[-1]
    digest = hashlib.sha256((question + salt).encode()).digest()
    scores = {name: digest[i] % 6 for i, name in enumerate(names)}
    return json.dumps({"rationale": "as seen in message 2", "scores": scores, "nonce": nonce})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        action = next_action(body)
        billed = action["kind"] not in ("status", "reset", "html", "redirect")
        with LOCK, open(LEDGER, "a", encoding="utf-8") as ledger:
            headers = {name.lower(): value for name, value in self.headers.items()}
            entry = {"path": self.path, "headers": headers, "body": body, "do": action["kind"], "billed": billed}
            ledger.write(json.dumps(entry) + "\n")
        self.request_body = json.loads(body)
        getattr(self, f"do_{action['kind']}")(action)

    # --- well-formed API replies ------------------------------------------------------------------------

    def question(self):
        asked = self.request_body
        if "output_config" in asked:
            return asked["messages"][0]["content"], asked["output_config"]["format"]["schema"]
        return asked["messages"][1]["content"], asked["response_format"]["json_schema"]["schema"]

    def envelope(self, text, stop, model=None):
        model = model or self.request_body["model"]
        if "chat/completions" in self.path:
            message = {"role": "assistant", "content": text}
            return {
                "id": "c", "object": "chat.completion", "created": 0, "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": {"end_turn": "stop"}.get(stop, stop)}],
                "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS, "total_tokens": 0},
            }  # fmt: skip
        return {
            "id": "msg", "type": "message", "role": "assistant", "model": model, "stop_reason": stop,
            "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": text}],
            "usage": {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS},
        }  # fmt: skip

    def do_good(self, action):
        question, schema = self.question()
        text = verdict(question, schema, action.get("salt", ""))
        if "delay_s" in action:
            time.sleep(action["delay_s"])
        self.send_json(self.envelope(text, action.get("stop", "end_turn"), action.get("model")))

    def do_text(self, action):
        """A reply with any text; NONCE in it becomes the question's nonce."""
        question, _ = self.question()
        nonce = re.findall(r"The nonce is ([0-9a-f]+)\.", question)[-1]
        text = action["text"].replace("NONCE", nonce)
        self.send_json(self.envelope(text, action.get("stop", "end_turn")))

    # --- failures ---------------------------------------------------------------------------------------

    def do_status(self, action):
        error = {"type": "error", "error": {"type": "api_error", "message": action.get("message", "no")}}
        headers = {"retry-after": action["retry_after"]} if "retry_after" in action else {}
        self.send_bytes(json.dumps(error).encode(), code=action["code"], headers=headers)

    def do_raw(self, action):
        """Any body with status 200."""
        self.send_bytes(action["body"].encode("utf-8", "surrogatepass"), kind=action.get("type", "application/json"))

    def do_html(self, action):
        self.send_bytes(b"<html><body>Bad gateway</body></html>", kind="text/html")

    def do_truncated(self, action):
        question, schema = self.question()
        body = json.dumps(self.envelope(verdict(question, schema, ""), "end_turn")).encode()
        self.send_bytes(body[: len(body) // 2])

    def do_redirect(self, action):
        self.send_bytes(b"", code=302, headers={"location": "http://127.0.0.1:9/"})

    def do_gzip(self, action):
        self.send_bytes(b"\x1f\x8b" + b"\0" * 100, headers={"content-encoding": "gzip"})

    def do_reset(self, action):
        """Close without a reply."""
        self.close_connection = True

    def do_drip(self, action):
        """A valid head, then one byte of body each 0.1 s, for ever."""
        self.start(length=10**6)
        self.pour(b" ", pause_s=0.1)

    def do_drip_head(self, action):
        """The head itself comes one byte each 0.1 s, for ever."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
        self.pour(b"a", pause_s=0.1)

    def do_endless(self, action):
        """A body that never ends, as fast as it goes; with `code`, as an error."""
        self.start(length=10**12, code=action.get("code", 200))
        self.pour(b" " * 65536, pause_s=0.0)

    # --- sending ----------------------------------------------------------------------------------------

    def start(self, length, code=200):
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length))
        self.end_headers()

    def pour(self, chunk, pause_s):
        self.close_connection = True
        try:
            while True:
                self.wfile.write(chunk)
                self.wfile.flush()
                time.sleep(pause_s)
        except OSError:
            pass

    def send_json(self, value):
        self.send_bytes(json.dumps(value).encode())

    def send_bytes(self, body, code=200, kind="application/json", headers=None):
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
