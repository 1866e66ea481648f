"""One vLLM server, asked over HTTP: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_perl.models.trunk import Trunk

if TYPE_CHECKING:
    import httpx

Json = dict[str, Any]
TRUNK = "the trunk"
"""What stands for the name under which a server serves the trunk."""
WORDS = "User: 0123 naïve 漢字\nAgent: x=1;"
"""What both tokenizers must read alike."""
BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What reading an answer of another form raises."""


class LostError(Exception):
    """A server gave no answer."""


class Answer(NamedTuple):
    """A response's tokens, their log-probabilities, and whether it ended itself."""

    ids: list[int]
    logprobs: list[float]
    stopped: bool


class Server:
    """A server; it may be asked from several threads.

    Args:
        url: Its address, perhaps with user and password (basic authentication).
        timeout: Seconds that it may take for one answer.

    Attributes:
        lost: Why it is not asked at present; None where it is.
        window: Tokens of the longest row that it takes.
    """

    def __init__(self, url: str, timeout: float) -> None:
        import httpx  # what this module needs of it comes with its client

        self._transport_error = httpx.TransportError
        self.url = re.sub("//[^/]*@", "//", url.rstrip("/"))  # shown, so without a password
        self.lost: str | None = None
        self.window = 0
        self._trunk = ""
        key = os.environ.get("VLLM_API_KEY")
        # Servers close connections that rest for 5 seconds; none is used that is about to be closed.
        self._client = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=1.0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
        )

    def tell(self, path: str, body: Json | None = None) -> httpx.Response:
        """What it answers to a body, or to none.

        Raises:
            LostError: Nothing in time, an error of its own, that it knows no such model, or has too much to do.
            RuntimeError: It refuses.
        """
        try:
            answer = self._client.request("GET" if body is None else "POST", path, json=body)
        except self._transport_error as error:
            raise LostError(f"{self.url}{path}: {type(error).__name__} {error}".strip()) from error
        status, text = answer.status_code, " ".join(answer.text.split())[:200]
        if status >= 500 or status in (404, 429):
            raise LostError(f"{self.url}{path}: HTTP {status} {text}")
        if status != 200:
            raise RuntimeError(f"{self.url}{path} refuses, HTTP {status}: {text}")
        return answer

    def ask(self, path: str, body: Json | None = None) -> Json:
        """The JSON that it answers; errors as `tell`."""
        answer = self.tell(path, body)
        try:
            parsed = answer.json()
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise RuntimeError(
                f"{self.url}{path} answers {answer.text[:60]!r} and no JSON object. Is it a vLLM server's address?"
            )
        return parsed

    def forget(self, name: str) -> None:
        """Unload an adapter. Whether it answers is found out when it is asked for what is needed."""
        with suppress(LostError, RuntimeError):
            if not self.lost:
                self.tell("/v1/unload_lora_adapter", {"lora_name": name})

    def check(self, trunk: Trunk, longest: int) -> None:
        """Ask what it serves.

        Raises:
            RuntimeError: With every setting that would sample from something else, or not at all.
        """
        models = self.ask("/v1/models").get("data") or [{}]
        own = next((model for model in models if not model.get("parent")), models[0])
        self._trunk, self.window = str(own.get("id")), int(own.get("max_model_len") or 0)
        config = self.ask("/server_info?config_format=json").get("vllm_config") or {}
        names = ("model_config", "lora_config", "parallel_config")
        model, lora, parallel = (config.get(name) or {} for name in names)
        words = {"model": self._trunk, "prompt": WORDS, "add_special_tokens": False}
        read = trunk.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
        rank = max((spec.rank for spec in trunk.adapters.specs.values()), default=0)
        equal = {
            "dtype": (model.get("dtype"), str(trunk.dtype)),
            "quantization": (model.get("quantization"), None),
            "--logprobs-mode": (model.get("logprobs_mode"), "processed_logprobs"),
            # An adapter would reach one of several replicas.
            "--data-parallel-size": (parallel.get("data_parallel_size"), 1),
            "what its tokenizer reads": (self.ask("/tokenize", words).get("tokens"), read),
        }
        least = {
            "--max-lora-rank": (lora.get("max_lora_rank") or 0, rank),
            "--max-model-len": (self.window, longest),
        }
        wrong = [f"{key} is {got}, not {want}" for key, (got, want) in equal.items() if got != want]
        wrong += [
            f"{key} is {got}, below {want}" for key, (got, want) in least.items() if got < want
        ]
        if wrong:
            raise RuntimeError(
                f"{self.url} does not serve {trunk.source} as the run needs it: {'; '.join(wrong)}. "
                "docs/servers.md has the command that starts a server."
            )

    def score(self, model: str, ids: list[int]) -> list[float]:
        """Log-probabilities of a row's tokens but the first."""
        body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        answer = self._complete(model, body)
        try:
            parts = answer["choices"][0]["prompt_logprobs"][1:]
            pairs = zip(parts, ids[1:], strict=True)
            return [float(part[str(token)]["logprob"]) for part, token in pairs]
        except BROKEN as error:
            raise RuntimeError(
                f"{self.url} gives no log-probability of each of a prompt's tokens ({error!r})."
            ) from error

    def respond(self, model: str, body: Json, vocabulary: int) -> Answer:
        """A response that is what was asked for.

        Raises:
            RuntimeError: It is something else.
        """
        said = self._complete(model, body)
        try:
            choice = said["choices"][0]
            ids = [int(number) for number in choice["token_ids"]]
            logprobs = [float(number) for number in choice["logprobs"]["token_logprobs"]]
            prompt, reason = choice["prompt_token_ids"], choice["finish_reason"]
        except BROKEN as error:
            raise RuntimeError(
                f"{self.url} answers without token ids and their log-probabilities ({error!r})."
            ) from error
        most, stops = body["max_tokens"], body["stop_token_ids"]
        ended = bool(ids) and ids[-1] in stops
        by_string = bool(body["stop"]) and reason == "stop"
        wrong = {
            f"reads another prompt than was sent ({prompt})": prompt != body["prompt"],
            f"gives {len(ids)} tokens of at most {most}": not 0 < len(ids) <= most,
            f"gives {len(logprobs)} log-probabilities of {len(ids)} tokens": len(logprobs)
            != len(ids),
            f"gives tokens that the trunk has not: {ids}": not all(
                0 <= i < vocabulary for i in ids
            ),
            f"goes on behind a token that ends a response: {ids}": any(
                i in stops for i in ids[:-1]
            ),
            f"ends by {reason!r} after {len(ids)} tokens: {ids}": not (
                ended or by_string or (reason == "length" and len(ids) == most)
            ),
            f"gives log-probabilities that are none: {logprobs}": not all(
                math.isfinite(number) and number < 1e-3 for number in logprobs
            ),
        }
        if problems := [problem for problem, found in wrong.items() if found]:
            raise RuntimeError(f"{self.url} {problems[0]}. Nothing was learned from it.")
        return Answer(ids, logprobs, ended or by_string)

    def _complete(self, model: str, body: Json) -> Json:
        named = self._trunk if model == TRUNK else model
        return self.ask("/v1/completions", {"model": named, **body})
