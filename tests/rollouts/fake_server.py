"""A vLLM server for tests: a tiny trunk behind HTTP, which misbehaves in one way where a test says so."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from lightning_perl.batches import PromptBatch
from lightning_perl.models.adapters import OFF, _read
from lightning_perl.models.trunk import Trunk
from lightning_perl.rollouts.sampling import SamplingSpec, row_uniforms, sample
from lightning_perl.rollouts.servers import _logprobs

Json = dict[str, Any]
NAME, SLOT = "served", "slot"
LOCK = threading.Lock()
"""Several fake servers may share one trunk."""


class FakeServer:
    """A server on a free port of this machine, until `stop`.

    Attributes:
        fault: How it misbehaves.
        adapters: Folders of what is loaded, by name.
        completed: Responses that it has given.
        good: How many it gives before it misbehaves ``late``.
        killed_by_second_push: A process that is killed when it pushes while an adapter is loaded.
    """

    def __init__(self, trunk: Trunk, fault: str = "", port: int = 0) -> None:
        self.trunk, self.fault = trunk, fault
        self.adapters: dict[str, Path] = {}
        self.completed, self.good = 0, 0
        self.killed_by_second_push: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.handle(self, {})

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                server.handle(self, json.loads(self.rfile.read(size)))

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Be gone: connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def handle(self, handler: BaseHTTPRequestHandler, body: Json) -> None:
        path = handler.path.partition("?")[0]
        generates = path == "/v1/completions" and "prompt_logprobs" not in body
        if generates and self.fault == "drops":
            handler.close_connection = True
            return
        if generates and self.fault == "slow":
            time.sleep(0.2)
        crowded = generates and self.fault == "crowded"
        status, answer = (429, "too many requests") if crowded else self.answer(path, body)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        if self.fault == "html" and generates:
            text = "<html>502 Bad Gateway</html>"
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text.encode())

    def answer(self, path: str, body: Json) -> tuple[int, Json | str]:
        """Status and what is answered."""
        if path == "/v1/models":
            window = 8 if self.fault == "window" else 128
            own = {"id": NAME, "parent": None, "max_model_len": window}
            return 200, {"data": [{"id": "other", "parent": NAME}, own]}
        if path == "/server_info":
            return 200, {"vllm_config": self.config()}
        if path == "/tokenize":
            ids = self.trunk.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {"tokens": [*ids, 3] if self.fault == "tokenizer" else ids}
        name = body.get("lora_name") or body["model"]
        if path == "/v1/load_lora_adapter":
            return self.load(name, Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            return (200, "Success") if self.adapters.pop(name, None) else (404, "not found")
        if self.fault == "evicts" and "prompt_logprobs" not in body:
            self.adapters.clear()
        if name != NAME and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        with LOCK:
            return 200, self.complete(name, body)

    def config(self) -> Json:
        """Settings, as vLLM 0.32 writes them."""
        mode = "raw_logprobs" if self.fault == "raw mode" else "processed_logprobs"
        dtype = "torch.bfloat16" if self.fault == "dtype" else str(self.trunk.dtype)
        quantization = "fp8" if self.fault == "quantized" else None
        return {
            "model_config": {"dtype": dtype, "logprobs_mode": mode, "quantization": quantization},
            "lora_config": {"rank": {"max_lora_rank": 1}, "no lora": None}.get(
                self.fault, {"max_lora_rank": 16}
            ),
            "parallel_config": {"data_parallel_size": 2 if self.fault == "replicas" else 1},
        }

    def load(self, name: str, folder: Path) -> tuple[int, str]:
        if self.adapters and self.killed_by_second_push is not None:
            os.kill(self.killed_by_second_push, signal.SIGKILL)
        if self.fault == "sees no folder":
            return 404, f"Loading lora {name} failed: No adapter found for {folder}"
        if self.fault == "refuses":
            return 400, f"LoRA rank of {name} is greater than max_lora_rank"
        with LOCK:
            if SLOT not in self.trunk.adapters.specs:
                self.trunk.adapters.load(SLOT, folder, trainable=False)
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def complete(self, name: str, body: Json) -> Json:
        """A completion, as vLLM 0.32 writes it."""
        prompt, scores = body["prompt"], "prompt_logprobs" in body
        base = self.fault == "base" or (self.fault == "forgets the adapter" and not scores)
        adapter = OFF if name == NAME or base else SLOT
        if adapter == SLOT:
            folder = next(iter(self.adapters.values())) if self.fault == "old adapter" else None
            _read(folder or self.adapters[name], self.trunk.adapters.tensors(SLOT))
        if scores:
            said = _logprobs(self.trunk, adapter, prompt)
            if self.fault == "another model":
                said = [number - 0.01 for number in said]
            parts = [{str(i): {"logprob": x}} for i, x in zip(prompt[1:], said, strict=True)]
            own: Json = {"prompt_logprobs": None if self.fault == "no prompt" else [None, *parts]}
            return {"choices": [own]}
        most, temperature = body["max_tokens"], body["temperature"]
        if self.fault == "temperature" or (self.fault == "late" and self.completed >= self.good):
            temperature = 1.0
        spec = SamplingSpec(most, temperature, body["top_p"], body["top_k"], tuple(body["stop"]))
        ids = torch.tensor([prompt])
        seed = torch.tensor([body["seed"]])
        rows = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), seed)
        with self.trunk.switch.use(adapter):
            rollout = sample(self.trunk, rows, spec, row_uniforms(0, 0, rows.row, most))
        self.completed += 1
        assert rollout.logprobs is not None
        tokens, logprobs = rollout.response_ids[0].tolist(), rollout.logprobs[0].tolist()
        choice: Json = {
            "token_ids": tokens,
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": "stop" if bool(rollout.stopped) else "length",
            "prompt_token_ids": prompt,
        }
        return {"choices": self.spoiled(choice)}

    def spoiled(self, choice: Json) -> list[Json]:
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        stops = self.trunk.stop_ids
        changes: dict[str, Json] = {
            "unknown ids": {"token_ids": [*tokens[:-1], 99]},
            "other ids": {"token_ids": [3 if token not in stops else token for token in tokens]},
            "no log-probabilities": {"logprobs": None},
            "too few log-probabilities": {"logprobs": {"token_logprobs": logprobs[:-1]}},
            "nan": {"logprobs": {"token_logprobs": [float("nan")] * len(tokens)}},
            "no tokens": {"token_ids": [], "logprobs": {"token_logprobs": []}},
            "goes on": {"token_ids": [2, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}},
            "ends early": {"token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}},
            "another prompt": {"prompt_token_ids": [4]},
        }
        return [] if self.fault == "no choice" else [choice | changes.get(self.fault, {})]
