"""Models in memory and the one thread that lets them write: a running batch for each base, adapters sharing their base."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tunesmith.errors import ModelError, TunesmithError
from tunesmith.local import model as models
from tunesmith.local.decode import Decoder
from tunesmith.local.generate import Written
from tunesmith.local.machine import free_memory, tune
from tunesmith.local.sampling import Answer, Sampling, Token
from tunesmith.models import find, read_json
from tunesmith.render import Renderer
from tunesmith.runs import run_of
from tunesmith.server.protocol import Refusal, busy

T = TypeVar("T")
log = logging.getLogger("tunesmith.server")
ADAPTERS = 64  # on one base in memory
CACHES = 0.5  # part of the free memory that keys and values may take; as much again is held while prompts are read
EXCHANGE = 20.0  # seconds in which a model that is in use may end its answers, so that another one has its place
EXCHANGES = 5  # times that a request has its model loaded again, where others have pushed it out meanwhile
LOADING = 20.0  # seconds that a request waits for a model before it is told to come again


class Piece(msgspec.Struct, frozen=True):
    """New text of an answer, and where their probabilities are asked for the tokens; `finish` as of Answer, "" before the end."""

    text: str
    tokens: list[Token]
    finish: str
    count: int = 0  # of the tokens that were written for it, without the one that ends an answer


class Ticket(msgspec.Struct, eq=False):
    """An answer on its way to the one who asked."""

    answer: Answer
    written: Written
    stop_ids: frozenset[int]
    arrived: asyncio.Queue[Piece]
    streams: bool
    owner: str = ""
    text: str = ""  # not yet delivered
    tokens: list[Token] = []
    count: int = 0
    begun: bool = False

    def take(self) -> Piece:
        """What there is to deliver; before the first, where it is asked for, what was heard of the prompt."""
        answer, tokens = self.answer, self.tokens
        if answer.how.echo and not self.begun:
            tokens = [Token(answer.prompt[0]), *answer.heard, *tokens]
        piece = Piece(self.text, tokens, answer.finish, self.count)
        self.text, self.tokens, self.count, self.begun = "", [], 0, True
        return piece


class Base:
    """A model in memory with the answers that it is writing."""

    def __init__(self, key: str, decoder: Decoder) -> None:
        self.key, self.decoder = key, decoder
        self.coming: list[Ticket] = []
        self.tickets: dict[int, Ticket] = {}  # by id() of their answers
        self.used = time.monotonic()

    def busy(self) -> bool:
        return bool(self.coming or self.tickets)


class Host(msgspec.Struct, frozen=True):
    """What a model's name leads to: its base in memory, the adapter on it, its template and tokenizer. `longest`: characters
    of a token at most, 0 where a tokenizer knows none for some texts."""

    base: Base
    adapter: str | None
    renderer: Renderer
    longest: int = 0


class Inference:
    """`most_models`: bases that are kept in memory. `queue`: answers that may wait."""

    def __init__(self, most_models: int = 4, most_answers: int = 256, queue: int = 1000) -> None:
        self._most_models, self._most_answers, self._queue = most_models, most_answers, queue
        self._bases: dict[str, Base] = {}
        self._hosts: dict[str, Host] = {}
        self._loading: dict[str, asyncio.Future[Host]] = {}
        self._changed = threading.Condition()  # held for moments only: the event loop waits for it
        self._stepping = threading.Lock()  # no adapter comes or goes in the middle of a step
        self._loader = ThreadPoolExecutor(1, "loading")  # one model at a time, and nobody else waits for it
        self._reader = ThreadPoolExecutor(1, "reading")  # of prompts: a tokenizer's words are of one thread
        self._ending = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.tokens = 0  # written since the start

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; what is still being written is cut off."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        for pool in (self._loader, self._reader):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._thread:
            await asyncio.to_thread(self._thread.join, 10)

    async def read(self, act: Callable[..., T], *given: Any) -> T:
        """What a function makes of a prompt, while the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, partial(act, *given))

    # ---- models

    async def host(self, folder: Path) -> Host:
        """The model of a folder, ready to write. Raises Refusal: 503 while it is loaded, 500 where it cannot be."""
        key = str(folder)
        if found := self._hosts.get(key):
            found.base.used = time.monotonic()
            return found
        task = self._loading.get(key)
        if task is None:
            loading = asyncio.get_running_loop().run_in_executor(self._loader, self._load, folder)
            task = self._loading[key] = asyncio.ensure_future(loading)
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        try:
            return await asyncio.wait_for(asyncio.shield(task), LOADING)
        except TimeoutError:
            raise _later("The model is being loaded") from None
        except TunesmithError as error:
            raise Refusal(500, f"The model cannot be loaded: {error.message}", type="server_error") from None

    def _load(self, folder: Path) -> Host:
        adapter = read_json(folder / "adapter_config.json")
        renderer = Renderer(folder if (folder / "tokenizer.json").exists() else find(_base_of(adapter)))
        longest = _longest(renderer)
        host = None
        if adapter and not _quantised(folder):
            with contextlib.suppress(ModelError):  # more than an adapter: with a base of its own
                base = self._base(find(_base_of(adapter)))
                self._on_base(base, folder)
                host = Host(base, str(folder), renderer, longest)
        host = host or Host(self._base(folder), None, renderer, longest)
        with self._changed:
            self._hosts[str(folder)] = host
        return host

    def _on_base(self, base: Base, folder: Path) -> None:
        """A model that is an adapter, on a base that others use too. Raises ModelError where it is more than that."""
        with self._stepping:
            with self._changed:
                used = {ticket.answer.adapter for ticket in (*base.tickets.values(), *base.coming)}
                mine = [key for key, host in self._hosts.items() if host.base is base and host.adapter]
                for key in [key for key in mine if key not in used][: max(0, len(mine) + 1 - ADAPTERS)]:
                    base.decoder.adapters.unload(key)
                    self._hosts.pop(key)
            base.decoder.adapters.load(str(folder), folder)

    def _base(self, folder: Path) -> Base:
        key = str(folder)
        if key not in self._bases:
            self._make_room()
            model = models.to_judge(key)
            share = CACHES * free_memory() / max(1, self._most_models - len(self._bases))  # others may still come
            made = Base(key, Decoder(model, self._most_answers, memory=share))
            with self._changed:
                self._bases[key] = made
        base = self._bases[key]
        base.used = time.monotonic()
        return base

    def _make_room(self) -> None:
        """Forget the base that nobody has used for the longest time: an idle one, else one that gets no more requests and ends
        those it has. Raises Refusal where that takes too long."""
        deadline = time.monotonic() + EXCHANGE
        with self._changed:
            while len(self._bases) >= self._most_models:
                gone = min(self._bases.values(), key=lambda base: (base.busy(), base.used))
                self._hosts = {name: host for name, host in self._hosts.items() if host.base is not gone}
                while gone.busy():
                    if time.monotonic() > deadline:
                        raise _later("All models in memory are in use")
                    self._changed.wait(0.05)
                self._bases.pop(gone.key, None)

    def forget(self, folder: Path) -> None:
        """A model has been deleted: who is being answered is answered, and nobody else."""
        with self._stepping, self._changed:
            host = self._hosts.pop(str(folder), None)
            if host is None:
                return
            using = {ticket.answer.adapter for ticket in (*host.base.tickets.values(), *host.base.coming)}
            if host.adapter is not None and host.adapter not in using:
                host.base.decoder.adapters.unload(host.adapter)
            elif host.adapter is None and not host.base.busy():
                self._bases.pop(host.base.key, None)

    def load(self) -> tuple[int, int, int]:
        """Bases in memory, answers in work, answers that wait."""
        with self._changed:
            loads = [base.decoder.load() for base in self._bases.values()]
        return len(loads), sum(n for n, _ in loads), sum(n for _, n in loads)

    # ---- answers

    def refuse_full(self, host: Host, more: int, owner: str) -> None:
        """Raises Refusal where so many answers more would wait too long. A request and a key have half of the places; "" is
        everybody, where there are no keys."""
        places = self._queue + self._most_answers
        if more > places // 2:
            raise Refusal(400, f"At most {places // 2} answers to a request")
        with self._changed:
            there = [ticket.owner for ticket in (*host.base.tickets.values(), *host.base.coming)]
        if len(there) + more > places:
            raise busy("Too many requests are waiting", 1)
        if owner and there.count(owner) + more > places // 2:
            raise busy("Too many requests of this key are waiting", 1)

    async def ask(
        self, host: Host, prompt: list[int], how: Sampling, stops: list[str], streams: bool, owner: str = ""
    ) -> AsyncGenerator[Piece]:
        """The pieces of an answer as they come; one whole piece where it does not stream. Leaving the iteration cancels it."""
        answer = Answer(prompt, how, host.adapter)
        ticket = Ticket(answer, Written(host.renderer, stops), how.stop_ids, asyncio.Queue(), streams, owner)
        for _ in range(EXCHANGES):
            with self._changed:
                there = self._bases.get(host.base.key) is host.base
                if there and (host.adapter is None or host.adapter in host.base.decoder.adapters):
                    host.base.coming.append(ticket)
                    self._changed.notify()
                    break
                key = host.adapter or host.base.key
                if self._hosts.get(key) is host:  # forgotten since: to be loaded again
                    self._hosts.pop(key)
            host = await self.host(Path(key))
        else:
            raise busy("The model was being exchanged", 1)
        try:
            while True:
                piece = await ticket.arrived.get()
                if piece.finish == "failed":
                    raise Refusal(500, "The model could not go on", type="server_error")
                yield piece
                if piece.finish:
                    return
        finally:
            answer.finish = answer.finish or "cancelled"

    def _work(self) -> None:
        tune()
        while self._await_work():
            self._step_each()

    def _await_work(self) -> bool:
        """Whether there is some; False at the end. No model is held here meanwhile: one that goes leaves the memory at once."""
        with self._changed:
            while not self._ending and not any(base.busy() for base in self._bases.values()):
                self._changed.wait()
            return not self._ending

    def _step_each(self) -> None:
        """A token for each answer of each base."""
        with self._changed:
            working = [base for base in self._bases.values() if base.busy()]
            for base in working:
                for ticket in base.coming:
                    base.tickets[id(ticket.answer)] = ticket
                    base.decoder.add(ticket.answer)
                base.coming = []
        for base in working:
            try:
                self._deliver(self._step(base))
            except Exception as error:  # a defect or want of memory: nobody may wait for ever
                log.exception("a step failed", extra={"about": {"error": str(error)}})
                ready = [(ticket, Piece("", [], "failed")) for ticket in base.tickets.values()]
                base.tickets = {}
                base.decoder.clear()
                self._deliver(ready)

    def _step(self, base: Base) -> list[tuple[Ticket, Piece]]:
        """A token for each answer; what there is to deliver."""
        ready: list[tuple[Ticket, Piece]] = []
        with self._stepping:
            chosen = base.decoder.step()
        self.tokens += len(chosen)
        for answer, token in chosen:
            ticket = base.tickets[id(answer)]
            piece = "" if token.id in ticket.stop_ids else ticket.written.add(token.id)
            if answer.finish and not ticket.written.stopped:
                piece += ticket.written.rest()
            elif ticket.written.stopped:
                answer.finish = "stop"
            ticket.text += piece
            if token.id not in ticket.stop_ids:
                ticket.count += 1
                if answer.how.logprobs is not None:
                    ticket.tokens.append(token)
            if answer.finish or ticket.streams and (piece or ticket.tokens):
                ready.append((ticket, ticket.take()))
        for key in [key for key, ticket in base.tickets.items() if ticket.answer.finish]:
            ticket = base.tickets.pop(key)
            if not any(ticket is other for other, _ in ready):  # asked for no token at all, or cancelled
                ready.append((ticket, ticket.take()))
        base.used = time.monotonic()
        return ready

    def _deliver(self, ready: list[tuple[Ticket, Piece]]) -> None:
        if ready and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_hand_over, ready)


def _later(why: str) -> Refusal:
    again = {"retry-after": "5"}
    return Refusal(503, why, type="server_error", code="model_loading", headers=again)


def _hand_over(ready: list[tuple[Ticket, Piece]]) -> None:
    for ticket, piece in ready:
        ticket.arrived.put_nowait(piece)


def _base_of(adapter: dict[str, Any]) -> str:
    """Raises ModelError where there is no adapter, because its folder has gone."""
    if not adapter:
        raise ModelError("its files are gone", fix="use another model")
    return str(adapter["base_model_name_or_path"])


def _longest(renderer: Renderer) -> int:
    """Characters of a tokenizer's longest token; 0 where it has one for any text that it does not know."""
    model = renderer.tokenizer.model
    if getattr(model, "unk_token", None) is not None and not getattr(model, "byte_fallback", False):
        return 0
    return max(map(len, renderer.tokenizer.get_vocab()))


def _quantised(folder: Path) -> bool:
    """Whether an adapter was trained on 4-bit weights, on which it is then loaded."""
    run = run_of(folder)
    return run is not None and run.recipe().method == "qlora"
