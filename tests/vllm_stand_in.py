"""Speaks what we ask of `vllm serve`, answered by transformers: vLLM itself needs what no test machine has.

python vllm_stand_in.py serve FOLDER --served-model-name NAME --host H --port P …; written after vLLM's own protocol files.
`STAND_IN`: a fault to have: deaf (ends at no stop token), dead (does not start).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

FAULT = os.environ.get("STAND_IN", "")


class Handler(BaseHTTPRequestHandler):
    model: Any
    names: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def give(self, found: Any, status: int = 200) -> None:
        data = b"" if found is None else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.give({"/health": None, "/version": {"version": "0.0-stand-in"}}[self.path])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.startswith("/v1") and self.headers["authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.give({"error": {"message": "Unauthorized"}}, 401)
        elif asked["model"] not in self.names:
            self.give({"error": {"message": f"The model `{asked['model']}` does not exist."}}, 404)
        elif self.path == "/tokenize":
            found = self.model._tokenizer.apply_chat_template(
                asked["messages"], add_generation_prompt=True, return_dict=False
            )
            self.give({"count": len(found), "max_model_len": 1, "tokens": found})
        else:
            self.give({"choices": [self.choice(i, p, asked) for i, p in reversed([*enumerate(asked["prompt"])])]})

    def choice(self, index: int, prompt: list[int], asked: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "text": "", "logprobs": None}
        if asked.get("logprobs"):
            top = self.model.next_tokens([*prompt, 0], [len(prompt)])[0]
            top = {f"token_id:{t}": v for t, v in [*top.items()][: asked["logprobs"]]}
            return {**found, "logprobs": {"top_logprobs": [top]}, "token_ids": [0], "finish_reason": "length"}
        if forced := asked.get("allowed_token_ids"):
            ids, ended = forced, forced[0] in self.model._stops
        else:
            answer = self.model.answers([prompt], asked["max_tokens"])[0]
            ids, ended = answer.ids + self.model._stops[:1] * answer.ended, answer.ended
        ended = ended and FAULT != "deaf"
        return {**found, "token_ids": ids, "finish_reason": "stop" if ended else "length"}


def main() -> None:
    if FAULT == "dead":
        sys.exit("ValueError: the stand-in will not start")
    from tunesmith.exporting.runtime import plain_transformers

    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("folder", type=Path)
    for name in ("--served-model-name", "--host", "--lora-modules", "--chat-template"):
        parser.add_argument(name, default="")
    for name in ("--port", "--max-logprobs", "--max-lora-rank"):
        parser.add_argument(name, type=int)
    parser.add_argument("--enable-lora", action="store_true")
    given = parser.parse_args()
    name, _, adapter = given.lora_modules.partition("=")
    assert bool(adapter) == given.enable_lora and (not adapter or Path(given.chat_template).exists())
    Handler.model = plain_transformers(Path(adapter) if adapter else given.folder)
    Handler.names = [name or given.served_model_name]
    HTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
