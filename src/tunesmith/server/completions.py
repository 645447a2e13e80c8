"""Chat completions and completions: what is asked as tokens and sampling, what is written as objects or a stream."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

from tunesmith.conversation import Message
from tunesmith.errors import DataError
from tunesmith.local.sampling import Sampling, Token
from tunesmith.render import Renderer
from tunesmith.server import store as db
from tunesmith.server.app import Call, Route
from tunesmith.server.inference import Host, Piece
from tunesmith.server.protocol import ChatRequest, CompletionRequest, Refusal

FINGERPRINT = "fp_tunesmith"
ALIVE = 10.0  # seconds of silence after which a stream says that it is alive
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
LEGACY_TOKENS = 16  # of a completion, as the protocol has it
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # as Hermes and Qwen write it


class Written(msgspec.Struct):
    """One choice of an answer, whole."""

    index: int
    text: str = ""
    tokens: list[Token] = []
    count: int = 0
    finish: str = ""


class Order(msgspec.Struct):
    """What the model is to do: a prompt for each choice, in their order."""

    host: Host
    prompts: list[list[int]]  # by choice
    how: list[Sampling]
    stops: list[str]
    streams: bool
    usage: bool
    prompt_tokens: int


async def create_chat_completion(call: Call, body: ChatRequest) -> Response:
    """The model's answer to a conversation."""
    _refuse(body)
    host = await call.service.inference.host(call.service.folder(body.model, call.caller))
    try:
        ids = host.renderer.prompt_ids(_messages(body.messages), _tools(body, host.renderer))
    except DataError as error:
        raise Refusal(400, error.message, param="messages") from None
    asked = body.max_completion_tokens or body.max_tokens
    how = _sampling(
        body, host, _room(host, len(ids), asked, "messages"), body.top_logprobs or 0 if body.logprobs else None
    )
    count = body.n or 1
    order = Order(
        host, [ids] * count, _seeds(how, body.seed, count), _stops(body.stop), bool(body.stream), _usage(body), len(ids)
    )
    return await _answer(call, order, _Chat(body, host))


async def create_completion(call: Call, body: CompletionRequest) -> Response:
    """What a model writes after a text."""
    if body.suffix:
        raise Refusal(400, "'suffix' is not offered here", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refusal(400, "'best_of' is not offered here", param="best_of")
    host = await call.service.inference.host(call.service.folder(body.model, call.caller))
    prompts = _prompts(body.prompt, host.renderer)
    most = LEGACY_TOKENS if body.max_tokens is None else body.max_tokens
    if not most and not body.echo:
        raise Refusal(400, "'max_tokens' is 0, and 'echo' is not set: nothing is asked for", param="max_tokens")
    each: list[Sampling] = []
    for ids in prompts:
        how = _sampling(body, host, _room(host, len(ids), most, "prompt"), body.logprobs)
        each += _seeds(
            msgspec.structs.replace(how, echo=bool(body.echo) and body.logprobs is not None), body.seed, body.n or 1
        )
    repeated = [ids for ids in prompts for _ in range(body.n or 1)]
    used = sum(map(len, prompts))
    order = Order(host, repeated, each, _stops(body.stop), bool(body.stream), _usage(body), used)
    return await _answer(call, order, _Text(body, host, repeated))


# ---- what is asked


def _refuse(body: ChatRequest) -> None:
    """What would silently change the meaning is refused."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refusal(400, "'max_tokens' and 'max_completion_tokens' are the same: give one", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "'top_logprobs' needs 'logprobs'", param="top_logprobs")
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise Refusal(400, "Only the response format 'text' is offered here", param="response_format")
    if body.tool_choice not in (None, "auto", "none"):
        raise Refusal(400, "Only the tool choices 'auto' and 'none' are offered here", param="tool_choice")


def _messages(given: list[dict[str, Any]]) -> list[Message]:
    found = []
    for number, message in enumerate(given):
        place, role = f"messages[{number}]", message.get("role")
        if role not in ROLES:
            raise Refusal(
                400, f"Invalid value: '{role}'. Supported values are: {', '.join(ROLES)}", param=f"{place}.role"
            )
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, f"{place}.content") for part in content)
        calls = message.get("tool_calls")
        if content is None and not calls and role != "assistant" or not isinstance(content, str | None):
            raise Refusal(400, "Expected a string or an array of parts", param=f"{place}.content")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
            raise Refusal(400, "Expected an array of calls", param=f"{place}.tool_calls")
        texts = {key: message.get(key) for key in ("tool_call_id", "name")}
        if not all(isinstance(text, str | None) for text in texts.values()):
            raise Refusal(400, "Expected strings", param=place)
        told: Any = "system" if role == "developer" else role
        found.append(Message(told, content or "", tool_calls=calls, **texts))
    return found


def _part(part: Any, place: str) -> str:
    if (
        not isinstance(part, dict)
        or not isinstance(part.get("text"), str)
        or part.get("type") not in ("text", "refusal")
    ):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise Refusal(400, f"This model reads text only, not '{kind}'", param=place)
    return str(part["text"])


def _tools(body: ChatRequest, renderer: Renderer) -> list[dict[str, Any]] | None:
    if not body.tools or body.tool_choice == "none":
        return None
    if "tools" not in renderer.template:
        raise Refusal(400, "This model's chat template knows no tools", param="tools")
    return body.tools


def _prompts(given: str | list[Any], renderer: Renderer) -> list[list[int]]:
    """A text, texts, token ids or lists of them, as lists of ids."""
    if isinstance(given, str) or given and all(isinstance(item, int) and not isinstance(item, bool) for item in given):
        given = [given]
    known, found = renderer.tokenizer.get_vocab_size(), []
    for item in given:
        if isinstance(item, str):
            begin = renderer.special["bos_token"]
            text = item if not begin or item.startswith(begin) else begin + item
            ids = renderer.tokenizer.encode(text, add_special_tokens=False).ids or [renderer.stop_ids[0]]
        elif isinstance(item, list) and item and all(isinstance(i, int) and 0 <= i < known for i in item):
            ids = item
        else:
            raise Refusal(400, "Expected a string, strings, token ids or lists of them", param="prompt")
        found.append(ids)
    if not found:
        raise Refusal(400, "The prompt is empty", param="prompt")
    if len(found) > 128:
        raise Refusal(400, "At most 128 prompts", param="prompt")
    return found


def _room(host: Host, prompt: int, asked: int | None, param: str) -> int:
    """Tokens that may be written. Raises Refusal where the context is too short for what is asked."""
    context = host.base.decoder.context
    left = context - prompt
    if left < (1 if asked is None else asked):
        used = f"your request has {prompt} tokens" + (f" and asks for {asked}" if asked else "")
        words = f"This model's maximum context length is {context} tokens; {used}"
        raise Refusal(400, words, param=param, code="context_length_exceeded")
    return left if asked is None else asked


def _sampling(body: ChatRequest | CompletionRequest, host: Host, most: int, logprobs: int | None) -> Sampling:
    biases = {}
    for token, bias in (body.logit_bias or {}).items():
        if not token.isdecimal():
            raise Refusal(400, f"'{token}' is no token id", param="logit_bias")
        biases[int(token)] = bias
    return Sampling(
        max_tokens=most,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        stop_ids=frozenset(host.renderer.stop_ids),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=biases,
        logprobs=logprobs,
    )


def _seeds(how: Sampling, seed: int | None, count: int) -> list[Sampling]:
    first = secrets.randbits(62) if seed is None else seed
    return [msgspec.structs.replace(how, seed=first + i) for i in range(count)]


def _stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else [s for s in stop or () if s]


def _usage(body: ChatRequest | CompletionRequest) -> bool:
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "'stream_options' needs 'stream'", param="stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)


# ---- what is written


async def _answer(call: Call, order: Order, form: _Chat | _Text) -> Response:
    call.service.inference.refuse_full(order.host, len(order.prompts))
    if order.streams:
        return StreamingResponse(
            _stream(call, order, form), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
    choices = [Written(i) for i in range(len(order.prompts))]
    asking = asyncio.create_task(_collect(call, order, choices))
    gone = asyncio.create_task(_gone(call))
    try:
        await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():  # nobody waits for it any more
            return Response(status_code=499)
        await asking
    finally:
        for task in (asking, gone):
            task.cancel()
    shown = form.head | {"choices": [form.whole(choice) for choice in choices], "usage": _used(order, choices)}
    return Response(msgspec.json.encode(shown), media_type="application/json")


async def _gone(call: Call) -> None:
    """Returns when the client has left."""
    while (await call.request.receive())["type"] != "http.disconnect":
        pass


async def _collect(call: Call, order: Order, choices: list[Written]) -> None:
    async for choice, piece in _pieces(call, order):
        _add(choices[choice], piece)


def _add(choice: Written, piece: Piece) -> None:
    choice.text += piece.text
    choice.tokens = choice.tokens + piece.tokens if piece.tokens else choice.tokens
    choice.count += piece.count
    choice.finish = piece.finish


def _used(order: Order, choices: list[Written]) -> dict[str, int]:
    written = sum(choice.count for choice in choices)
    return {
        "prompt_tokens": order.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": order.prompt_tokens + written,
    }


async def _pieces(call: Call, order: Order) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of all choices as they come, each with the number of its choice. Leaving the iteration ends them all."""
    arrived: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

    async def one(number: int) -> None:
        try:
            asked = call.service.inference.ask(
                order.host, order.prompts[number], order.how[number], order.stops, order.streams
            )
            async with aclosing(asked) as pieces:
                async for piece in pieces:
                    arrived.put_nowait((number, piece))
        except Exception as error:
            arrived.put_nowait((number, error))

    tasks = [asyncio.create_task(one(i)) for i in range(len(order.prompts))]
    try:
        left = len(tasks)
        while left:
            number, piece = await arrived.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= bool(piece.finish)
            yield number, piece
    finally:
        for task in tasks:
            task.cancel()


async def _stream(call: Call, order: Order, form: _Chat | _Text) -> AsyncIterator[bytes]:
    """Server-sent events: pieces as they come, a sign of life in long silences, the usage where asked for, [DONE]."""
    choices = [Written(i) for i in range(len(order.prompts))]
    usage = {"usage": None} if order.usage else {}
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def feed() -> None:
        try:
            async with aclosing(_pieces(call, order)) as pieces:
                async for item in pieces:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Refusal as refusal:
            queue.put_nowait(refusal)

    feeding = asyncio.create_task(feed())
    try:
        for choice in choices:
            if head := form.first(choice):
                yield _frame(form.chunk | {"choices": [head]} | usage)
        while True:
            try:
                item = await asyncio.wait_for(queue.get(), ALIVE)
            except TimeoutError:
                yield b": alive\n\n"
                continue
            if isinstance(item, Refusal):
                yield _frame(item.envelope())
                return
            if item is None:
                break
            number, piece = item
            shown = form.pieces(choices[number], piece)
            _add(choices[number], piece)
            for part in shown:
                yield _frame(form.chunk | {"choices": [part]} | usage)
        if order.usage:
            yield _frame(form.chunk | {"choices": [], "usage": _used(order, choices)})
        yield b"data: [DONE]\n\n"
    finally:
        feeding.cancel()


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _token(renderer: Renderer, token: int) -> str:
    return renderer.decode([token], special=True)


class _Chat:
    """How a chat completion is written."""

    def __init__(self, body: ChatRequest, host: Host) -> None:
        self._renderer, self._tools, self._logprobs = host.renderer, bool(body.tools), bool(body.logprobs)
        common = {"id": db.new_id("chatcmpl-"), "created": int(time.time()), "model": body.model}
        self.head: dict[str, Any] = {"object": "chat.completion", **common, "system_fingerprint": FINGERPRINT}
        self.chunk: dict[str, Any] = {"object": "chat.completion.chunk", **common, "system_fingerprint": FINGERPRINT}

    def whole(self, choice: Written) -> dict[str, Any]:
        text, calls = self._called(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        finish = "tool_calls" if calls else choice.finish
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._told(choice.tokens),
            "finish_reason": finish,
        }

    def first(self, choice: Written) -> dict[str, Any]:
        return self._delta(choice, {"role": "assistant", "content": ""})

    def pieces(self, choice: Written, piece: Piece) -> list[dict[str, Any]]:
        found = []
        if self._tools:  # whether it is a call is known at its end only
            if not piece.finish:
                return []
            text, calls = self._called(choice.text + piece.text)
            if text:
                found.append(self._delta(choice, {"content": text}, choice.tokens + piece.tokens))
            if calls:
                found.append(self._delta(choice, {"tool_calls": [{"index": i, **c} for i, c in enumerate(calls)]}))
            finish = "tool_calls" if calls else piece.finish
        else:
            if piece.text or piece.tokens:
                found.append(self._delta(choice, {"content": piece.text}, piece.tokens))
            finish = piece.finish
        if finish:
            found.append({**self._delta(choice, {}), "finish_reason": finish})
        return found

    def _delta(self, choice: Written, delta: dict[str, Any], tokens: list[Token] | None = None) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._told(tokens or []) if tokens else None,
            "finish_reason": None,
        }

    def _called(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text without the calls of tools in it, and these."""
        calls = []
        for found in CALL.finditer(text) if self._tools else ():
            try:
                said = json.loads(found[1])
                arguments = said.get("arguments", {})
                words = arguments if isinstance(arguments, str) else json.dumps(arguments)
                function = {"name": str(said["name"]), "arguments": words}
                calls.append({"id": db.new_id("call_"), "type": "function", "function": function})
            except (ValueError, KeyError, AttributeError):
                continue
        return (CALL.sub("", text).strip() if calls else text), calls

    def _told(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None

        def shown(id: int, logprob: float) -> dict[str, Any]:
            text = _token(self._renderer, id)
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        content = [{**shown(t.id, t.logprob or 0.0), "top_logprobs": [shown(id, p) for id, p in t.top]} for t in tokens]
        return {"content": content, "refusal": None}


class _Text:
    """How a completion is written: chunks of a stream have the form of the whole."""

    def __init__(self, body: CompletionRequest, host: Host, prompts: list[list[int]]) -> None:
        self._renderer, self._prompts = host.renderer, prompts
        self._echo, self._logprobs = bool(body.echo), body.logprobs
        common = {"created": int(time.time()), "model": body.model, "system_fingerprint": FINGERPRINT}
        self.head: dict[str, Any] = {"id": db.new_id("cmpl-"), "object": "text_completion", **common}
        self.chunk = self.head

    def whole(self, choice: Written) -> dict[str, Any]:
        text = self._before(choice) + choice.text
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._told(choice.tokens, 0),
            "finish_reason": choice.finish,
        }

    def first(self, choice: Written) -> dict[str, Any]:
        before = self._before(choice)
        return {"index": choice.index, "text": before, "logprobs": None, "finish_reason": None} if before else {}

    def pieces(self, choice: Written, piece: Piece) -> list[dict[str, Any]]:
        begun = choice.tokens or not self._echo  # else the prompt's tokens come with the first piece
        offset = len(self._before(choice)) + len(choice.text) if begun else 0
        told = self._told(piece.tokens, offset) if piece.tokens else None
        return [{"index": choice.index, "text": piece.text, "logprobs": told, "finish_reason": piece.finish or None}]

    def _before(self, choice: Written) -> str:
        return self._renderer.decode(self._prompts[choice.index]) if self._echo else ""

    def _told(self, tokens: list[Token], offset: int) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        texts = [_token(self._renderer, t.id) for t in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{_token(self._renderer, id): p for id, p in t.top} if t.top else None for t in tokens],
            "text_offset": offsets,
        }


ROUTES = [
    Route("POST", "/chat/completions", create_chat_completion, None, ChatRequest),
    Route("POST", "/completions", create_completion, None, CompletionRequest),
]
