"""Programs that an export is asked through besides transformers, each a server in a process of its own: llama.cpp and vLLM.

A bad file ends that process, not ours. They listen on loopback and ask for a key: else any user of the machine could ask them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import msgspec

from tunesmith.conversation import Message
from tunesmith.errors import ModelError, UsageError
from tunesmith.exporting.runtime import LIKELIEST, Answer
from tunesmith.models import read_json

START = 600.0  # seconds in which a program must have read a model
GREEDY = {
    "temperature": 0,
    "repeat_penalty": 1.0,
    "return_tokens": True,
    "cache_prompt": True,
    "samplers": ["temperature"],
}
# Runs a program until the input is at its end, which it is when whoever started it has gone; all that it has started goes too
UNTIL_EOF = '{ "$@"; kill -9 -$$; } & cat >/dev/null; kill -9 -$$'
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM has memory for


class _Program:
    """A process that serves a model, what it said, and questions to it.

    `env`: variables for it, the key for each that is empty. `out`: where it prints; 0: where its errors go.
    """

    def __init__(self, called: str, command: list[str], env: dict[str, str], out: IO[str] | int) -> None:
        self.called, self.key, self.address = called, secrets.token_hex(), ""
        # A pipe that nobody reads would stop it once it is full
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in end
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out or self._said,
            stderr=self._said,
            text=True,
            env=os.environ | {name: value or self.key for name, value in env.items()},
            start_new_session=True,  # vLLM's engine is a process of that one
        )
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(self, path: str, body: Any = None, seconds: float = START) -> Any:
        """What it answers to a question, or ModelError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with self._open(request, timeout=seconds) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            other = f"another version of {self.called} may take it"
            raise ModelError(f"{self.called} refuses: {_refusal(error)}", where=path, fix=other) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            again = "is there memory enough for it? then try again"
            raise ModelError(f"{self.called} has ended: {error}", where=path, fix=again) from None

    def end(self) -> str:
        """Stop it, with all that it has started; its last words."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, 9)
        self.process.communicate()
        with self._said as said:
            said.seek(0)
            return said.read()


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


class LlamaCpp:
    """A GGUF file in llama.cpp's own server. `stops`: the tokens that end an answer."""

    def __init__(self, file: Path, context: int, stops: list[int]) -> None:
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        self._stops = stops
        command = [sys.executable, "-m", "tunesmith.exporting.llamacpp", str(file), str(context)]
        self._program = _Program("llama.cpp", command, {}, subprocess.PIPE)
        process = self._program.process
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._program.key + "\n")
            process.stdin.flush()
        said, _, _ = select.select([process.stdout], [], [], START)
        self._program.address = process.stdout.readline().strip() if said else ""
        if not self._program.address:
            fix = "is there memory enough for it? another version of xllamacpp may load it"
            raise ModelError(f"llama.cpp cannot load it: {_why(self._program.end())}", where=str(file), fix=fix)
        try:
            self._whole = self._program.ask("/tokenize", {"content": "a"})["tokens"][-1]
        except (ModelError, LookupError):
            self._program.end()
            raise

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        ask = self._program.ask
        text = ask("/apply-template", {"messages": msgspec.to_builtins(list(messages))})["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in ask("/tokenize", body)["tokens"]]

    def answers(self, prompts: Sequence[list[int]], most: int) -> list[Answer]:
        return [self._answer(prompt, most) for prompt in prompts]

    def _answer(self, prompt: list[int], most: int) -> Answer:
        found = self._program.ask("/completion", {**GREEDY, "prompt": prompt, "n_predict": most})
        ids = found["tokens"]
        ended = found["stop_type"] == "eos"
        return Answer(ids[:-1] if ended and ids and ids[-1] in self._stops else ids, ended)

    def ends(self, prompt: list[int], token: int) -> bool:
        forced = {**GREEDY, "prompt": prompt, "n_predict": 2, "logit_bias": [[token, 1000.0]]}
        return bool(self._program.ask("/completion", forced)["stop_type"] == "eos")

    def next_tokens(self, ids: list[int], places: Sequence[int]) -> list[dict[int, float]]:
        # The token that it draws is forced, which the probabilities do not see: of half a character it would tell none
        asked = {**GREEDY, "n_predict": 1, "n_probs": LIKELIEST, "logit_bias": [[self._whole, 1000.0]]}
        found = (self._program.ask("/completion", {**asked, "prompt": ids[:place]}) for place in places)
        return [{t["id"]: t["logprob"] for t in f["completion_probabilities"][0]["top_logprobs"]} for f in found]

    def close(self) -> None:
        self._program.end()


def _why(said: str) -> str:
    """What a program named as the reason, of all that it wrote."""
    lines = said.strip().splitlines() or ["it says nothing of why"]
    named = [line.partition("error loading model: ")[2] for line in lines if "error loading model: " in line]
    return (named or [line for line in lines if "rror" in line] or lines)[-1][:300]


# ---- vLLM


def vllm_program() -> str | None:
    """Where vLLM's command is: beside this Python, or on the PATH."""
    beside = os.path.dirname(sys.executable)
    return shutil.which("vllm", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")


def vllm_serve(folder: Path, at: Path, name: str) -> list[str]:
    """The words after `vllm` that serve an export as `name`. `folder`: where its files are; `at`: where they will be."""
    config = read_json(folder / "adapter_config.json")
    if not config:
        return ["serve", str(at), "--served-model-name", name]
    if config.get("use_dora"):
        raise UsageError("vLLM serves no DoRA", where="--unmerged", fix="leave it out: the model is merged")
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 1)
    lora = ["--enable-lora", "--max-lora-rank", str(next((r for r in RANKS if r >= rank), rank))]
    template = ["--chat-template", str(at / "chat_template.jinja")]
    return ["serve", str(config["base_model_name_or_path"]), *lora, "--lora-modules", f"{name}={at}", *template]


class Vllm:
    """An export in vLLM's own server, started by the command that its user is told. `stops`: the tokens that end an answer."""

    def __init__(self, program: str, folder: Path, stops: list[int]) -> None:
        self._stops, self._model = stops, "export"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [program, *vllm_serve(folder, folder, self._model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-logprobs", str(LIKELIEST)]
        env = {"VLLM_API_KEY": "", "VLLM_NO_USAGE_STATS": "1"}
        self._program = _Program("vLLM", ["sh", "-c", UNTIL_EOF, "sh", *command], env, 0)
        self._program.address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START
        while not self._ready():
            if self._program.process.poll() is not None or time.monotonic() > until:
                said = _why(self._program.end())
                fix = "run that command to see all that it says"
                raise ModelError(f"vLLM cannot serve it: {said}", where=shlex.join(command), fix=fix)
            time.sleep(0.5)
        self.name = f"vLLM {self._program.ask('/version')['version']}"

    def _ready(self) -> bool:
        with contextlib.suppress(ModelError):
            self._program.ask("/health", seconds=10)
            return True
        return False

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        plain = [{k: v for k, v in msgspec.to_builtins(m).items() if k != "weight"} for m in messages]
        return list(self._program.ask("/tokenize", {"model": self._model, "messages": plain})["tokens"])

    def _complete(self, prompts: Sequence[list[int]], most: int, **asked: Any) -> list[dict[str, Any]]:
        body = {
            "model": self._model,
            "prompt": prompts,
            "max_tokens": most,
            "temperature": 0,
            "repetition_penalty": 1.0,
        }
        found = self._program.ask("/v1/completions", {**body, "return_token_ids": True, **asked})["choices"]
        return sorted(found, key=lambda choice: int(choice["index"]))

    def answers(self, prompts: Sequence[list[int]], most: int) -> list[Answer]:
        found = []
        for choice in self._complete(prompts, most):
            ids, ended = list(choice["token_ids"]), choice["finish_reason"] == "stop"
            found.append(Answer(ids[:-1] if ended and ids and ids[-1] in self._stops else ids, ended))
        return found

    def ends(self, prompt: list[int], token: int) -> bool:
        return bool(self._complete([prompt], 2, allowed_token_ids=[token])[0]["finish_reason"] == "stop")

    def next_tokens(self, ids: list[int], places: Sequence[int]) -> list[dict[int, float]]:
        asked = {"logprobs": LIKELIEST, "return_tokens_as_token_ids": True}
        found = self._complete([ids[:place] for place in places], 1, **asked)
        tops = [choice["logprobs"]["top_logprobs"][0] for choice in found]
        return [{int(token.removeprefix("token_id:")): value for token, value in top.items()} for top in tops]

    def close(self) -> None:
        self._program.end()
