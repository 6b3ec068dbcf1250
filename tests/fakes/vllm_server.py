"""A vLLM server as a client sees it, on loopback, with a small model of transformers behind it.

Routes, fields, defaults and the wording of errors are those of vLLM 0.33.0 (vllm/entrypoints/openai/completion,
openai/models, serve/lora, serve/dev/sleep, serve/tokenize, serve/exception_handling; the order of sampling is that of
vllm/v1/sample/sampler.py). What a field unknown to vLLM would do there, be ignored, is kept for a test to see.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

COMPLETION_FIELDS = frozenset([
    "model", "prompt", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty",
    "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user", "use_beam_search",
    "top_k", "min_p", "repetition_penalty", "watermarking", "length_penalty", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
    "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side", "allowed_token_ids",
    "prompt_logprobs", "logprob_token_ids", "bad_words", "prompt_embeds", "add_special_tokens", "response_format",
    "structured_outputs", "priority", "request_id", "session_id", "return_tokens_as_token_ids", "return_token_ids",
    "return_weight_versions", "cache_salt", "kv_transfer_params", "vllm_xargs",
])  # fmt: skip
TINY = -9999.0  # what vLLM writes for minus infinity
COLDEST = 0.01


class RefusedError(Exception):
    """An answer with an error, in vLLM's shape."""

    def __init__(self, code: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def not_found() -> RefusedError:
    return RefusedError(404, "Not Found", "Not Found")


@dataclass
class Flags:
    """What the server was started with."""

    model: Path
    served_name: str = ""
    max_model_len: int = 256
    max_lora_rank: int = 16
    logprobs_mode: str = "raw_logprobs"
    dev_mode: bool = True
    sleep_mode: bool = True
    runtime_lora: bool = True
    api_key: str = ""
    generation_config: dict[str, Any] = field(default_factory=dict)
    returns_token_ids: bool = True

    @property
    def name(self) -> str:
        return self.served_name or str(self.model)


class FakeVLLM:
    """A running server; a context manager.

    `faults` are given to the next completions, one each: an HTTP status, "drop" (the connection is closed) or "abort".
    `spoil` changes a completion before it is sent. `corrupt_on_wake` changes weights, as sleeping once did
    (https://github.com/vllm-project/vllm/issues/53888).
    """

    def __init__(self, model: Path, **flags: Any) -> None:
        self.flags = Flags(model, **{"logprobs_mode": "processed_logprobs", **flags})
        self.requests: list[tuple[str, Any]] = []
        self.faults: list[Any] = []
        self.spoil: Any = None
        self.corrupt_on_wake = False
        self.unknown_fields: set[str] = set()
        self.open = self.most_open = 0
        self._lock = threading.Lock()
        self._model_lock = threading.Lock()
        self._awake = threading.Event()
        self._stopped = threading.Event()
        self.restart()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.handle(self, None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("content-length") or 0))
                server.handle(self, json.loads(raw) if raw else None)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def restart(self, **flags: Any) -> None:
        """Start anew, with other flags: awake, without adapters."""
        for name, value in flags.items():
            setattr(self.flags, name, value)
        self.tokenizer = AutoTokenizer.from_pretrained(self.flags.model)
        self.eos_token_id = self.tokenizer.eos_token_id
        self.base = AutoModelForCausalLM.from_pretrained(self.flags.model).eval()
        self.adapters: dict[str, str] = {}
        self._models: dict[str, Any] = {}
        self._awake.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    @property
    def sleeping(self) -> bool:
        return not self._awake.is_set()

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def bodies(self, path: str) -> list[Any]:
        return [body for found, body in self.requests if found == path]

    def __enter__(self) -> FakeVLLM:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._awake.set()
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()

    # --- HTTP ---------------------------------------------------------------------------------------------------

    def handle(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        parts = urlsplit(handler.path)
        with self._lock:
            self.requests.append((parts.path, body))
        try:
            code, answer = 200, self._answer(handler, parts.path, parse_qs(parts.query), body)
        except RefusedError as error:
            code, answer = error.code, error.body
        except ConnectionAbortedError:
            handler.close_connection = True
            handler.connection.close()
            return
        kind = "text/plain" if isinstance(answer, str) else "application/json"
        payload = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        handler.send_response(code)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    def _answer(self, handler: BaseHTTPRequestHandler, path: str, query: dict[str, list[str]], body: Any) -> Any:
        wanted = f"Bearer {self.flags.api_key}"
        if self.flags.api_key and path.startswith("/v1") and handler.headers.get("authorization") != wanted:
            refused = RefusedError(401, "", "")
            refused.body = {"error": "Unauthorized"}
            raise refused
        kind = str(handler.headers.get("content-type")).partition(";")[0]
        if handler.command == "POST" and body is not None and kind != "application/json":
            raise RefusedError(400, "Bad Request", "Unsupported Media Type: Only 'application/json' is allowed")
        routes: dict[tuple[str, str], Any] = {
            ("GET", "/version"): lambda: {"version": "0.33.0"},
            ("GET", "/v1/models"): self._cards,
            ("POST", "/tokenize"): lambda: self._tokenize(body),
            ("POST", "/v1/completions"): lambda: self._completion(body),
        }
        if self.flags.dev_mode:
            model_config = {"enable_sleep_mode": self.flags.sleep_mode, "logprobs_mode": self.flags.logprobs_mode}
            info = {"vllm_config": {"model_config": model_config}, "vllm_env": {}, "system_env": {}}
            routes |= {
                ("GET", "/is_sleeping"): lambda: {"is_sleeping": self.sleeping},
                ("GET", "/server_info"): lambda: info if query.get("config_format") == ["json"] else {},
                ("POST", "/sleep"): lambda: self._sleep(int(query.get("level", ["1"])[0])),
                ("POST", "/wake_up"): self._wake,
            }
        if self.flags.runtime_lora:
            routes |= {
                ("POST", "/v1/load_lora_adapter"): lambda: self._load(body),
                ("POST", "/v1/unload_lora_adapter"): lambda: self._unload(body),
            }
        if (handler.command, path) not in routes:
            raise not_found()
        return routes[handler.command, path]()

    # --- models, adapters, sleep --------------------------------------------------------------------------------

    def _cards(self) -> Any:
        def card(name: str, root: str, parent: str | None, limit: int | None) -> Any:
            common = {"object": "model", "created": 0, "owned_by": "vllm", "permission": []}
            return {"id": name, "root": root, "parent": parent, "max_model_len": limit, **common}

        base = card(self.flags.name, str(self.flags.model), None, self.flags.max_model_len)
        loras = [card(name, path, self.flags.name, None) for name, path in self.adapters.items()]
        return {"object": "list", "data": [base, *loras]}

    def _check_model(self, name: str | None) -> None:
        if name and name != self.flags.name and name not in self.adapters:
            message = f"The model `{name}` does not exist. Valid aliases: {self.flags.name}."
            raise RefusedError(404, "NotFoundError", message, "model")

    def _load(self, body: Any) -> str:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters and not body.get("load_inplace", False):
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                "set 'load_inplace' to True."
            )
            raise RefusedError(400, "InvalidUserInput", message)
        if not (Path(path) / "adapter_config.json").is_file():
            raise RefusedError(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        rank = PeftConfig.from_pretrained(path).r
        if rank > self.flags.max_lora_rank:
            message = f"LoRA rank {rank} is greater than max_lora_rank {self.flags.max_lora_rank}."
            raise RefusedError(500, "InternalServerError", message)
        base = AutoModelForCausalLM.from_pretrained(self.flags.model)
        self._models[name] = PeftModel.from_pretrained(base, path).eval()
        self.adapters[name] = path
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: Any) -> str:
        name = body["lora_name"]
        if name not in self.adapters:
            raise RefusedError(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name], self._models[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _sleep(self, level: int) -> Any:
        self._awake.clear()
        return {"status": "sleeping", "level": level}

    def _wake(self) -> Any:
        if self.corrupt_on_wake:
            with torch.no_grad(), self._model_lock:
                generator = torch.Generator().manual_seed(0)
                for weight in self.base.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator))
        self._awake.set()
        return {"status": "awake", "tags": None}

    def _tokenize(self, body: Any) -> Any:
        self._check_model(body.get("model"))
        ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
        return {"count": len(ids), "max_model_len": self.flags.max_model_len, "tokens": ids, "token_strs": None}

    # --- completions --------------------------------------------------------------------------------------------

    def _completion(self, body: Any) -> Any:
        self.unknown_fields |= set(body) - COMPLETION_FIELDS
        self._check_model(body.get("model"))
        self._check_prompt(body)
        with self._lock:
            fault = self.faults.pop(0) if self.faults else None
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            if fault == "drop":
                raise ConnectionAbortedError
            if isinstance(fault, int):
                raise RefusedError(fault, "InternalServerError", "a fault of the test")
            self._awake.wait()  # a paused scheduler queues what is new
            if self._stopped.is_set():
                raise ConnectionAbortedError
            answer = self._generate(body, aborted=fault == "abort")
        finally:
            with self._lock:
                self.open -= 1
        if self.spoil is not None:
            self.spoil(answer)
        return answer

    def _check_prompt(self, body: Any) -> None:
        prompt, limit = body.get("prompt"), self.flags.max_model_len
        if not isinstance(prompt, list) or not prompt or not all(type(one) is int for one in prompt):
            raise RefusedError(400, "Bad Request", "this fake takes one prompt of token ids")
        if max(prompt) >= self.base.config.vocab_size:
            raise RefusedError(400, "BadRequestError", f"Token id {max(prompt)} is out of vocabulary")
        if (body.get("max_tokens") or 16) > limit:
            message = f"max_tokens={body['max_tokens']} cannot be greater than max_model_len={limit}. "
            raise RefusedError(400, "BadRequestError", f"{message}Please request fewer output tokens.", "max_tokens")
        if len(prompt) >= limit:
            message = (
                f"This model's maximum context length is {limit} tokens. However, your prompt contains {len(prompt)} "
                "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of "
                "the input prompt."
            )
            raise RefusedError(400, "BadRequestError", message, "input_tokens")

    @torch.no_grad()
    def _generate(self, body: Any, *, aborted: bool) -> Any:
        model = self._models.get(body["model"], self.base)
        most = min(body.get("max_tokens") or 16, self.flags.max_model_len - len(body["prompt"]))
        tokens: list[int] = []
        top: list[dict[int, float]] = []
        finish, reason = "abort", None
        draw = Draw(body, self.flags)
        with self._model_lock:
            found = model(input_ids=torch.tensor([body["prompt"]]), use_cache=True)
            of_prompt = prompt_logprobs(found.logits[0], body["prompt"]) if body.get("prompt_logprobs") == 0 else None
            while not (aborted or self.sleeping):
                token, logprobs = draw(found.logits[0, -1])
                tokens.append(token)
                top.append(logprobs)
                finish, reason = self._finish(body, token, len(tokens), most)
                if finish:
                    break
                step = torch.tensor([[token]])
                found = model(input_ids=step, past_key_values=found.past_key_values, use_cache=True)
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(tokens, skip_special_tokens=body.get("skip_special_tokens", True)),
            "logprobs": None if body.get("logprobs") is None else self._logprobs(body, tokens, top),
            "finish_reason": finish or "abort",
            "stop_reason": reason,
            "token_ids": tokens if body.get("return_token_ids") and self.flags.returns_token_ids else None,
            "prompt_logprobs": of_prompt,
            "prompt_token_ids": body["prompt"] if body.get("return_token_ids") else None,
            "routed_experts": None,
        }
        lengths = len(body["prompt"]), len(tokens)
        usage = {"prompt_tokens": lengths[0], "completion_tokens": lengths[1], "total_tokens": sum(lengths)}
        rest = {"service_tier": None, "system_fingerprint": None, "kv_transfer_params": None}
        common = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": body["model"], "usage": usage}
        return {**common, "choices": [choice], **rest}

    def _finish(self, body: Any, token: int, num: int, most: int) -> tuple[str, int | None]:
        if token == self.eos_token_id and not body.get("ignore_eos"):
            return "stop", None
        if token in (body.get("stop_token_ids") or ()):
            return "stop", token
        return ("length", None) if num >= most else ("", None)

    def _logprobs(self, body: Any, tokens: list[int], top: list[dict[int, float]]) -> Any:
        def name(token: int) -> str:
            as_id = body.get("return_tokens_as_token_ids")
            return f"token_id:{token}" if as_id else self.tokenizer.decode([token])

        shown = [
            {name(i): max(p, TINY) for rank, (i, p) in enumerate(step.items()) if body["logprobs"] >= rank}
            for step in top
        ]
        return {
            "text_offset": [0] * len(tokens),
            "token_logprobs": [max(step[token], TINY) for token, step in zip(tokens, top, strict=True)],
            "tokens": [name(token) for token in tokens],
            "top_logprobs": shown,
        }


class Draw:
    """One request's way from logits to a token, in vLLM's order; log-probs of the token and the likeliest ones."""

    def __init__(self, body: Any, flags: Flags) -> None:
        asked = {key: value for key, value in body.items() if value is not None}
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "min_p": 0.0}
        self.settings = {**defaults, **flags.generation_config, **asked}
        assert self.settings["repetition_penalty"] == 1.0 and self.settings["min_p"] == 0.0, "not in this fake"
        self.mode, self.num = flags.logprobs_mode, int(body.get("logprobs") or 0)
        self.generator = torch.Generator()
        if body.get("seed") is not None:
            self.generator.manual_seed(body["seed"])
        else:
            self.generator.seed()

    def __call__(self, raw: torch.Tensor) -> tuple[int, dict[int, float]]:
        logits = raw.float()
        if allowed := self.settings.get("allowed_token_ids"):
            mask = torch.full_like(logits, -torch.inf)
            mask[allowed] = 0.0
            logits = logits + mask
        temperature = self.settings["temperature"]
        if temperature < 1e-5:
            token = int(logits.argmax())
        else:
            logits = top_k_top_p(logits / max(temperature, COLDEST), self.settings["top_k"], self.settings["top_p"])
            race = torch.empty_like(logits).exponential_(generator=self.generator)
            token = int((logits.softmax(-1) / race).argmax())
        kept = {"raw_logits": raw.float(), "processed_logits": logits}.get(self.mode)
        if kept is None:
            kept = (raw.float() if self.mode == "raw_logprobs" else logits).log_softmax(-1)
        likeliest = kept.topk(self.num)
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return token, {token: float(kept[token]), **dict(pairs)}


def top_k_top_p(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(descending=False)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[-1] = False
        logits = logits.scatter(0, index, ordered.masked_fill(dropped, -torch.inf))
    return logits


def prompt_logprobs(logits: torch.Tensor, prompt: list[int]) -> list[Any]:
    known = logits.float().log_softmax(-1)
    entries = [
        {str(t): {"logprob": float(known[i, t]), "rank": 1, "decoded_token": ""}} for i, t in enumerate(prompt[1:])
    ]
    return [None, *entries]
