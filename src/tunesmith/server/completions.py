"""Chat completions and completions: from a request to answers, and these as one object or a stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

from tunesmith.local.sampling import Sampling
from tunesmith.server import asked
from tunesmith.server.app import Call, Route
from tunesmith.server.forms import ChatForm, TextForm, Written
from tunesmith.server.inference import Host, Piece
from tunesmith.server.protocol import ChatRequest, CompletionRequest, Refusal

log = logging.getLogger("tunesmith.server")
ALIVE = 10.0  # seconds of silence after which a stream says that it is alive
LEGACY_TOKENS = 16  # of a completion, as the protocol has it


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
    asked.refuse(body)
    host = await _host(call, body.model)
    ids = await call.service.inference.read(asked.conversation, body, host)
    most = asked.room(host, len(ids), body.max_completion_tokens or body.max_tokens, "messages")
    how = asked.sampling(body, host, most, body.top_logprobs or 0 if body.logprobs else None)
    each, stops = asked.seeds(how, body.seed, body.n or 1), asked.stops(body.stop)
    order = Order(host, [ids] * len(each), each, stops, bool(body.stream), asked.usage(body), len(ids))
    return await _answer(call, order, ChatForm(body, host))


async def create_completion(call: Call, body: CompletionRequest) -> Response:
    """What a model writes after a text."""
    if body.suffix:
        raise Refusal(400, "'suffix' is not offered here", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refusal(400, "'best_of' is not offered here", param="best_of")
    host = await _host(call, body.model)
    prompts = await call.service.inference.read(asked.prompts, body.prompt, host)
    most = LEGACY_TOKENS if body.max_tokens is None else body.max_tokens
    if not most and not body.echo:
        raise Refusal(400, "'max_tokens' is 0, and 'echo' is not set: nothing is asked for", param="max_tokens")
    each: list[Sampling] = []
    for ids in prompts:
        how = asked.sampling(body, host, asked.room(host, len(ids), most, "prompt"), body.logprobs)
        how = msgspec.structs.replace(how, echo=bool(body.echo) and body.logprobs is not None)
        each += asked.seeds(how, body.seed, body.n or 1)
    repeated = [ids for ids in prompts for _ in range(body.n or 1)]
    used = sum(map(len, prompts))
    order = Order(host, repeated, each, asked.stops(body.stop), bool(body.stream), asked.usage(body), used)
    return await _answer(call, order, TextForm(body, host, repeated))


async def _host(call: Call, model: str) -> Host:
    folder = await asyncio.to_thread(call.service.folder, model, call.caller)
    try:
        return await call.service.inference.host(folder)
    except Refusal:
        await asyncio.to_thread(call.service.folder, model, call.caller)  # 404 where it went meanwhile
        raise


# ---- what is written


async def _answer(call: Call, order: Order, form: ChatForm | TextForm) -> Response:
    call.service.inference.refuse_full(order.host, len(order.prompts), call.owner)
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
    choice.tokens += piece.tokens
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
                order.host, order.prompts[number], order.how[number], order.stops, order.streams, call.owner
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


async def _stream(call: Call, order: Order, form: ChatForm | TextForm) -> AsyncIterator[bytes]:
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
        except Exception:
            log.exception("a stream failed", extra={"about": {}})
            queue.put_nowait(Refusal(500, "The server had an error", type="server_error"))

    feeding = asyncio.create_task(feed())
    try:
        for choice in choices:
            if head := form.first(choice):
                yield _frame(form.chunk | {"choices": [head]} | usage)
        heard = time.monotonic()
        while True:
            try:
                item = await asyncio.wait_for(queue.get(), ALIVE)
            except TimeoutError:
                item = ...
            if item is ... or time.monotonic() - heard > ALIVE:  # what is held back is no sign of life either
                yield b": alive\n\n"
                heard = time.monotonic()
            if item is ...:
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
                heard = time.monotonic()
        if order.usage:
            yield _frame(form.chunk | {"choices": [], "usage": _used(order, choices)})
        yield b"data: [DONE]\n\n"
    finally:
        feeding.cancel()


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


ROUTES = [
    Route("POST", "/chat/completions", create_chat_completion, None, ChatRequest),
    Route("POST", "/completions", create_completion, None, CompletionRequest),
]
