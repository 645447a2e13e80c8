"""Answers over the wire: whole, streamed, several at a time; and fair to all who ask."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any
from urllib.parse import urlparse

import openai
import pytest

from serving import Server

ASK: dict[str, Any] = {"model": "starter", "messages": [{"role": "user", "content": "What is rain?"}]}


def test_greedy_answers_repeat_and_equal_those_of_chat(server: Server, strict: openai.OpenAI) -> None:
    from tunesmith.conversation import Conversation, Message
    from tunesmith.local.generate import Chat

    want = Chat("starter")([Conversation((Message("user", "What is rain?"),))], max_tokens=30)[0]
    answers = [strict.chat.completions.create(**ASK, temperature=0, max_tokens=30) for _ in range(2)]
    assert [a.choices[0].message.content for a in answers] == [want, want]
    used = answers[0].usage
    assert (
        used and used.total_tokens == used.prompt_tokens + used.completion_tokens and 0 < used.completion_tokens <= 30
    )
    assert answers[0].choices[0].finish_reason in ("stop", "length") and answers[0].id != answers[1].id


def test_seeds_repeat_and_choices_differ(strict: openai.OpenAI) -> None:
    def ask(**how: Any) -> list[str | None]:
        found = strict.chat.completions.create(**ASK, temperature=1.2, max_tokens=20, **how)
        assert [c.index for c in found.choices] == list(range(len(found.choices)))
        return [c.message.content for c in found.choices]

    assert ask(seed=5, n=3) == ask(seed=5, n=3) and len(set(ask(seed=5, n=3))) == 3
    assert ask(seed=5) == ask(seed=5, n=3)[:1] != ask(seed=6)
    assert ask() != ask()


def test_a_stream_has_the_same_text(strict: openai.OpenAI) -> None:
    how: dict[str, Any] = {
        **ASK,
        "temperature": 0.9,
        "seed": 3,
        "n": 2,
        "max_tokens": 25,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = strict.chat.completions.create(**how)
    texts, finish, roles, tokens = ["", ""], [None, None], [0, 0], [0, 0]
    chunks = list(strict.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id and chunk.object == "chat.completion.chunk"
        for c in chunk.choices:
            texts[c.index] += c.delta.content or ""
            roles[c.index] += c.delta.role == "assistant"
            tokens[c.index] += len(c.logprobs.content or []) if c.logprobs else 0
            assert finish[c.index] is None  # nothing comes after the end
            finish[c.index] = c.finish_reason
    assert texts == [c.message.content for c in whole.choices] and finish == [c.finish_reason for c in whole.choices]
    assert roles == [1, 1] and tokens == [len(c.logprobs.content or []) for c in whole.choices if c.logprobs]
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage


def test_the_stream_is_server_sent_events(server: Server) -> None:
    found = server.ask("POST", "/chat/completions", {**ASK, "stream": True, "max_tokens": 2})
    assert found.headers["content-type"].startswith("text/event-stream")
    frames = found.body.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""] and all(f.startswith("data: {") for f in frames[:-2])
    first, last = (json.loads(frames[i].removeprefix("data: ")) for i in (0, -3))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length" and "usage" not in first


def test_stop_strings_are_no_part_of_the_answer(strict: openai.OpenAI) -> None:
    free = strict.chat.completions.create(**ASK, temperature=0, max_tokens=30).choices[0].message.content or ""
    word = free.split()[3]
    for stream in (False, True):
        for stop in (word, ["zzz", word]):
            made: Any = strict.chat.completions.create(**ASK, temperature=0, max_tokens=30, stop=stop, stream=stream)
            if stream:
                chunks = list(made)
                text, end = (
                    "".join(c.choices[0].delta.content or "" for c in chunks),
                    chunks[-1].choices[0].finish_reason,
                )
            else:
                text, end = made.choices[0].message.content, made.choices[0].finish_reason
            assert text == free[: free.index(word)] and end == "stop"


def test_logprobs_are_told_where_asked_for(strict: openai.OpenAI) -> None:
    found = strict.chat.completions.create(**ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3)
    told = found.choices[0].logprobs
    assert told and told.content and len(told.content) == 6
    assert "".join(t.token for t in told.content) == found.choices[0].message.content
    assert all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob <= 0 for t in told.content)
    assert bytes(b for t in told.content for b in t.bytes or []).decode() == found.choices[0].message.content
    assert strict.chat.completions.create(**ASK, max_tokens=2).choices[0].logprobs is None


def test_parts_of_characters_are_told_by_their_bytes(server: Server, strict: openai.OpenAI) -> None:
    from tunesmith.models import STARTER
    from tunesmith.render import Renderer

    text = "a🙂ü b"
    ids = Renderer(STARTER).tokenizer.encode(text, add_special_tokens=False).ids
    order = {"model": "starter", "prompt": text, "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 0}
    told = server.ask("POST", "/completions", order).json()["choices"][0]["logprobs"]
    assert told["tokens"] == ["a", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "\ufffd", " b"]
    assert told["text_offset"] == [0, 1, 1, 1, 2, 2, 3]
    half = ids[1]  # the first bytes of the emoji
    found = strict.chat.completions.create(
        **ASK, temperature=0, max_tokens=2, logprobs=True, top_logprobs=1, logit_bias={str(half): 100}
    ).choices[0]
    assert found.logprobs and found.logprobs.content
    assert [bytes(t.bytes or []) for t in found.logprobs.content] == ["🙂".encode()[:2]] * 2
    assert {t.token for t in found.logprobs.content} == {"\ufffd"}


def test_a_temperature_next_to_zero_is_none(strict: openai.OpenAI) -> None:
    cold = [
        strict.chat.completions.create(**ASK, temperature=t, max_tokens=8).choices[0].message.content
        for t in (0, 1e-40, 1e-4)
    ]
    assert len(set(cold)) == 1


def test_biases_and_penalties_act(strict: openai.OpenAI) -> None:
    from tunesmith.models import STARTER
    from tunesmith.render import Renderer

    renderer = Renderer(STARTER)
    (token,) = renderer.tokenizer.encode(" rain", add_special_tokens=False).ids
    forced = strict.chat.completions.create(**ASK, temperature=0, max_tokens=5, logit_bias={str(token): 100})
    assert forced.choices[0].message.content == " rain" * 5
    free = strict.chat.completions.create(
        **ASK, temperature=0, max_tokens=5, logit_bias={str(token): 100}, frequency_penalty=2
    )
    assert free.choices[0].message.content == " rain" * 5  # 100 is more than five times 2
    mild = strict.chat.completions.create(**ASK, temperature=0, max_tokens=40, presence_penalty=2, frequency_penalty=2)
    plain = strict.chat.completions.create(**ASK, temperature=0, max_tokens=40)
    assert mild.choices[0].message.content != plain.choices[0].message.content


def test_roles_and_parts_are_read(strict: openai.OpenAI) -> None:
    def said(messages: Any) -> str | None:
        return (
            strict.chat.completions.create(model="starter", messages=messages, temperature=0, max_tokens=12)
            .choices[0]
            .message.content
        )

    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "rain?"}]
    assert said([{"role": "user", "content": parts}]) == said(ASK["messages"])
    system, developer = ([{"role": role, "content": "Be brief."}, *ASK["messages"]] for role in ("system", "developer"))
    assert said(system) == said(developer)
    assert said([*ASK["messages"], {"role": "assistant", "content": "Water."}, {"role": "user", "content": "Why?"}])


def test_completions(strict: openai.OpenAI, server: Server) -> None:
    from tunesmith.models import STARTER
    from tunesmith.render import Renderer

    how: dict[str, Any] = {"model": "starter", "temperature": 0, "max_tokens": 4}
    one = strict.completions.create(prompt="The sea is", **how)
    assert one.object == "text_completion" and one.usage and one.usage.completion_tokens == 4
    ids = Renderer(STARTER).tokenizer.encode("The sea is", add_special_tokens=False).ids
    many = strict.completions.create(prompt=["The sea is", "A cat"], n=2, **how)
    assert [c.index for c in many.choices] == [0, 1, 2, 3] and many.choices[0].text == many.choices[
        1
    ].text == one.choices[0].text
    assert strict.completions.create(prompt=ids, **how).choices[0].text == one.choices[0].text
    assert strict.completions.create(prompt=[ids, ids], **how).choices[1].text == one.choices[0].text
    echoed = strict.completions.create(prompt="The sea is", echo=True, **how).choices[0].text
    assert echoed == "The sea is" + one.choices[0].text
    stream = server.client().completions.create(
        prompt="The sea is", stream=True, **how
    )  # null before the end: as OpenAI
    assert "".join(c.choices[0].text for c in stream) == one.choices[0].text
    endless = {"2": -100, "0": -100}  # nothing ends it but the protocol's own length
    legacy = strict.completions.create(model="starter", prompt="A cat", temperature=0, logit_bias=endless)
    assert legacy.usage and legacy.usage.completion_tokens == 16 and legacy.choices[0].finish_reason == "length"
    judged = server.ask(
        "POST", "/completions", {**how, "prompt": "The sea is", "echo": True, "max_tokens": 0, "logprobs": 1}
    ).json()
    told = judged["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] is None and all(p < 0 for p in told["token_logprobs"][1:])
    assert "".join(told["tokens"]) == "The sea is" == judged["choices"][0]["text"]
    assert told["text_offset"] == [0, *(sum(map(len, told["tokens"][:i])) for i in range(1, len(told["tokens"])))]


def test_who_leaves_is_written_for_no_more(server: Server) -> None:
    where = urlparse(server.url)
    body = json.dumps({**ASK, "stream": True, "logit_bias": {"2": -100, "0": -100}, "max_tokens": 1500}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    for stream in (True, False):
        data = body if stream else body.replace(b'"stream": true', b'"stream":false')
        with socket.create_connection((where.hostname, where.port)) as line:
            line.sendall(head.encode() + data)
            server.wait_until(lambda: figure(server, "tunesmith_answers") == 1, 10)
        server.wait_until(lambda: figure(server, "tunesmith_answers") == 0, 10)
    assert server.ask("POST", "/chat/completions", {**ASK, "max_tokens": 2}).status == 200


def figure(server: Server, name: str) -> float:
    lines = server.ask("GET", "/metrics").body.decode().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))


def test_many_at_once_are_all_answered_fairly(server: Server) -> None:
    client = server.client(timeout=120)
    client.chat.completions.create(**ASK, max_tokens=1)  # it is loaded
    want = client.chat.completions.create(**ASK, temperature=0, max_tokens=10).choices[0].message.content
    rounds: list[int] = []  # in the order of their ends
    wrong: list[Any] = []

    def ask() -> None:
        for number in range(4):
            got = client.chat.completions.create(**ASK, temperature=0, max_tokens=10).choices[0].message.content
            rounds.append(number)
            if got != want:
                wrong.append(got)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rounds) == 80 and not wrong
    assert rounds[: rounds.index(3)].count(0) >= 15  # nobody has four answers before the others have one
    assert figure(server, "tunesmith_tokens_total") >= 800 and figure(server, "tunesmith_models") >= 1


def test_a_short_answer_does_not_wait_for_a_long_one(server: Server) -> None:
    endless = {**ASK, "logit_bias": {"2": -100, "0": -100}, "max_tokens": 1500}
    with server.client().chat.completions.create(**endless, stream=True) as long:
        next(iter(long))
        assert server.ask("POST", "/chat/completions", {**ASK, "max_tokens": 2}).status == 200
        assert figure(server, "tunesmith_answers") == 1  # the long one is still being written


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_for_those_who_watch(server: Server, path: str) -> None:
    found = server.ask("GET", path)
    assert found.status == 200
    if path == "/health":
        assert found.json() == {"status": "ok"}
    else:
        assert 'tunesmith_requests_total{method="GET",path="/health",status="200"}' in found.body.decode()
        assert 'tunesmith_jobs{status="queued"}' in found.body.decode()


def test_the_probabilities_of_a_completion(strict: Any) -> None:
    """As the types say, also where none besides the token's own is asked for."""
    asked = {"model": "tiny", "prompt": "a b", "max_tokens": 3, "temperature": 0}
    own = strict.completions.create(**asked, logprobs=0).choices[0].logprobs
    two = strict.completions.create(**asked, logprobs=2).choices[0].logprobs
    assert own.top_logprobs is None and own.token_logprobs == two.token_logprobs and len(own.tokens) <= 3
    assert [max(top.values()) for top in two.top_logprobs] == two.token_logprobs
