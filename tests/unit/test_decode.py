"""Many answers at a time: the same as one at a time, and as transformers' own generation."""

from __future__ import annotations

import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import STARTER, rows, write
from training import architecture, fit
from tunesmith.conversation import Message
from tunesmith.errors import ModelError
from tunesmith.local import model as models
from tunesmith.local.decode import ROOM, Decoder
from tunesmith.local.generate import Chat, Written
from tunesmith.local.sampling import Answer, Sampling, Token, choose
from tunesmith.render import Renderer

PROMPTS = [[(5 * i + 11 * n) % 290 + 3 for i in range(n)] for n in (1, 3, 9, 30, 17)]


def finish(decoder: Decoder, answers: list[Answer]) -> list[list[int]]:
    for answer in answers:
        decoder.add(answer)
    while decoder.busy():
        decoder.step()
    assert all(answer.finish for answer in answers)
    return [answer.ids for answer in answers]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architecture("llama", tmp_path_factory.mktemp("m") / "llama")


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        ("llama", True),
        ("gpt2", True),
        ("qwen2", True),
        ("gemma2", False),
        ("opt", None),
        ("bloom", False),
        ("mpt", False),
    ],
)
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, kind: str, packed: bool | None) -> None:
    model = models.load(architecture(kind, tmp_path / kind)).eval()
    want = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        want.append(out[0, len(prompt) :].tolist())
    decoder = Decoder(model)
    assert packed is None or decoder.packed is packed
    assert decoder.context >= 128 and decoder.token_bytes() > 0
    how = Sampling(max_tokens=40)
    assert finish(decoder, [Answer(p, how) for p in PROMPTS]) == want
    assert finish(decoder, [Answer(PROMPTS[3], how)]) == [want[3]]  # alone, and after others have left


def test_joining_and_leaving_in_the_middle_changes_nothing(llama: Path) -> None:
    decoder = Decoder(models.load(llama).eval())
    how = Sampling(max_tokens=60)  # over ROOM with its prompt: caches grow
    want = finish(decoder, [Answer(p, how) for p in PROMPTS])
    answers = [Answer(p, how) for p in PROMPTS]
    cancelled = Answer(PROMPTS[2], how)
    for number, answer in enumerate(answers):
        decoder.add(answer)
        if number == 1:
            decoder.add(cancelled)
        for _ in range(3):
            decoder.step()
    cancelled.finish = "cancelled"
    while decoder.busy():
        decoder.step()
    assert [a.ids for a in answers] == want and 0 < len(cancelled.ids) < 60
    assert decoder.load() == (0, 0) and not any(g.keys for g in decoder._groups.values())  # no cache is kept


def test_too_little_room_lets_answers_wait_and_read_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(llama).eval()
    how = Sampling(max_tokens=80)
    want = finish(Decoder(model), [Answer(p, how) for p in PROMPTS])
    narrow = Decoder(model, tokens=3 * ROOM)
    answers = [Answer(p, how) for p in PROMPTS]
    for answer in answers:
        narrow.add(answer)
    waited, seen = 0, 0
    while narrow.busy():
        narrow.step()
        held, most = narrow._held(), narrow.load()
        assert held <= 3 * ROOM or most[0] == 1
        assert reserved(narrow) <= 3 * ROOM or most[0] == 1
        waited, seen = max(waited, most[1]), seen + 1
    assert [a.ids for a in answers] == want and waited >= 2
    monkeypatch.setattr("tunesmith.local.decode.PROMPT_TOKENS", 7)  # and what is read again comes in parts
    assert finish(Decoder(model, tokens=3 * ROOM), [Answer(p, how) for p in PROMPTS]) == want
    few = Decoder(model, most=2)
    assert finish(few, [Answer(p, how) for p in PROMPTS]) == want


def reserved(decoder: Decoder) -> int:
    """Tokens for which there is memory."""
    return sum(len(keys) * keys.shape[2] for g in decoder._groups.values() for keys in [*g.keys.values()][:1])


def test_slots_are_bound_by_bytes(llama: Path) -> None:
    model = models.load(llama).eval()
    token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, fp32
    short = [Answer([5, 6, 7], Sampling(max_tokens=4)) for _ in range(30)]
    most = {}
    for memory in (1e9, 4 * ROOM * token):
        decoder = Decoder(model, memory=memory)
        for answer in short:
            decoder.add(Answer(answer.prompt, answer.how))
        most[memory] = 0
        while decoder.busy():
            decoder.step()
            assert reserved(decoder) * token <= memory
            groups = decoder._groups.values()
            held = sum(t.nbytes for g in groups for part in (g.keys, g.values) for t in part.values())
            assert held == reserved(decoder) * token == reserved(decoder) * decoder.token_bytes()
            most[memory] = max(most[memory], decoder.load()[0])
    assert list(most.values()) == [30, 4]
    assert Decoder(model, memory=4 * ROOM * token).longest == min(4 * ROOM, decoder.context)
    assert Decoder(model, memory=0).longest == ROOM  # one short answer is always possible


def test_long_prompts_are_read_in_parts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(llama).eval()
    how = Sampling(max_tokens=10, echo=True, logprobs=0)
    whole = [Answer(p, how) for p in PROMPTS]
    want = finish(Decoder(model), whole)
    monkeypatch.setattr("tunesmith.local.decode.PROMPT_TOKENS", 7)
    parts = [Answer(p, how) for p in PROMPTS]
    assert finish(Decoder(model), parts) == want
    for one, other in zip(whole, parts, strict=True):  # what was heard of the prompt as well
        assert [t.id for t in one.heard] == one.prompt[1:] == [t.id for t in other.heard]
        assert [t.logprob for t in one.heard] == pytest.approx([t.logprob for t in other.heard], abs=1e-4)


def test_log_probabilities_are_those_of_the_model(llama: Path) -> None:
    model = models.load(llama).eval()
    answer = Answer(PROMPTS[2], Sampling(max_tokens=5, logprobs=3, temperature=0.0))
    told: list[Token] = []
    decoder = Decoder(model)
    decoder.add(answer)
    while decoder.busy():
        told += [token for _, token in decoder.step()]
    ids = torch.tensor([answer.prompt + answer.ids])
    with torch.no_grad():
        want = torch.log_softmax(model(ids).logits[0, len(answer.prompt) - 1 : -1], 1)
    for row, token in zip(want, told, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()


def drawn(how: Sampling, logits: list[float], said: list[int] | None = None) -> Counter[int]:
    found: Counter[int] = Counter()
    for seed in range(2000):
        answer = Answer([1], how)
        answer.ids = list(said or [])
        answer.chance = random.Random(seed)
        found[choose([answer], torch.tensor([logits]))[0][1].id] += 1
    return found


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    found = drawn(Sampling(temperature=1.0), logits)
    assert [found[i] / 2000 for i in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    cold = drawn(Sampling(temperature=0.5), logits)  # probabilities squared
    assert cold[0] / 2000 == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.04)
    assert set(drawn(Sampling(temperature=1.0, top_p=0.75), logits)) == {0, 1}  # the least that make up 0.75
    assert set(drawn(Sampling(temperature=1.0, top_p=0.0), logits)) == {0}
    assert set(drawn(Sampling(temperature=1.0, logit_bias={3: 100.0, 99: 5.0}), logits)) == {3}
    assert set(drawn(Sampling(logit_bias={0: -100.0}), logits)) == {1}
    assert set(drawn(Sampling(presence_penalty=1.0), logits, [0, 0])) == {1}  # 0.5 / e < 0.3
    assert set(drawn(Sampling(frequency_penalty=0.2), logits, [0])) == {0}
    assert set(drawn(Sampling(frequency_penalty=0.2), logits, [0, 0, 0])) == {1}


def test_a_seed_gives_the_same_answer_in_any_company(llama: Path) -> None:
    decoder = Decoder(models.load(llama).eval())

    def one(seed: int) -> Answer:
        return Answer(PROMPTS[1], Sampling(max_tokens=20, temperature=1.0, seed=seed))

    alone = finish(decoder, [one(7)])[0]
    assert finish(decoder, [one(3), one(7), one(9)])[1] == alone
    assert finish(decoder, [one(8)])[0] != alone


def test_stop_tokens_end_an_answer(llama: Path) -> None:
    decoder = Decoder(models.load(llama).eval())
    free = finish(decoder, [Answer(PROMPTS[1], Sampling(max_tokens=20))])[0]
    answer = Answer(PROMPTS[1], Sampling(max_tokens=20, stop_ids=frozenset({free[4]})))
    finish(decoder, [answer])
    assert answer.ids == free[: free.index(free[4]) + 1] and answer.finish == "stop"
    silent = Answer(PROMPTS[1], Sampling(max_tokens=0, echo=True, logprobs=0))
    assert (
        finish(decoder, [silent]) == [[]] and silent.finish == "length" and len(silent.heard) == len(silent.prompt) - 1
    )


# ---- adapters


def test_adapters_share_a_base_in_one_batch(tiny: Path, tmp_path: Path) -> None:
    folders = []
    for number, extra in enumerate(({}, {"use_rslora": True, "lora_targets": "q_proj,down_proj"})):
        data = write(tmp_path / f"d{number}.jsonl", rows(20, words=3 + number))
        run = fit(
            tmp_path / f"run{number}",
            data,
            tiny,
            method="lora",
            learning_rate=5e-2,
            epochs=4,
            lora_rank=4,
            seed=number,
            **extra,
        )
        folders.append(run / "final_model")
    ids = Renderer(tiny).prompt_ids((Message("user", "Question number 3?"),))
    how = Sampling(max_tokens=12)
    want = [finish(Decoder(models.to_judge(str(f))), [Answer(ids, how)])[0] for f in (tiny, *folders)]
    assert len({tuple(w) for w in want}) == 3
    decoder = Decoder(models.to_judge(str(tiny)))
    for folder in folders:
        decoder.adapters.load(str(folder), folder)
    names = [None, *map(str, folders)]
    order = [2, 0, 1, 1, 2, 0]
    assert finish(decoder, [Answer(ids, how, names[i]) for i in order]) == [want[i] for i in order]
    decoder.adapters.unload(str(folders[0]))
    assert str(folders[0]) not in decoder.adapters and finish(decoder, [Answer(ids, how, names[2])]) == [want[2]]
    decoder.adapters.unload(str(folders[1]))
    assert not decoder.adapters._hooks and finish(decoder, [Answer(ids, how)]) == [want[0]]


def test_what_is_more_than_an_adapter_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", rows(20))
    run = fit(tmp_path / "run", data, tiny, method="lora", use_dora=True, max_steps=1)
    decoder = Decoder(models.to_judge(str(tiny)))
    with pytest.raises(ModelError, match="use_dora"):
        decoder.adapters.load("x", run / "final_model")
    other = architecture("gpt2", tmp_path / "gpt2")
    shutil.copyfile(STARTER / "tokenizer.json", other / "tokenizer.json")
    plain = fit(tmp_path / "plain", data, tiny, method="lora", max_steps=1)
    with pytest.raises(ModelError, match="is not in the base"):
        Decoder(models.load(other)).adapters.load("x", plain / "final_model")


# ---- text


def test_text_comes_in_whole_characters_and_adds_up() -> None:
    renderer = Renderer(STARTER)
    text = "Héllo 🙂👩‍👩‍👧 世界 <ok>\n\n  end"
    ids = renderer.tokenizer.encode(text, add_special_tokens=False).ids
    written = Written(renderer)
    pieces = [written.add(i) for i in ids] + [written.rest()]
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces) and len([p for p in pieces if p]) > 5


@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (["two"], "one "),
        (["wo th", "three"], "one t"),
        (["e t", "one"], ""),
        (["four"], "one two three"),
        (["three!"], "one two three"),
        ([""], "one two three"),
    ],
)
def test_stop_strings_end_the_text_and_are_no_part_of_it(stops: list[str], want: str) -> None:
    renderer = Renderer(STARTER)
    written = Written(renderer, stops)
    shown = ""
    for token in renderer.tokenizer.encode("one two three", add_special_tokens=False).ids:
        shown += written.add(token)
        assert want.startswith(shown)  # nothing is taken back
        if written.stopped:
            break
    shown += written.rest()
    assert shown == want and written.stopped == (want != "one two three") and written.characters == len(want)


def test_chat_streams_what_it_answers() -> None:
    chat = Chat("starter")
    asked = (Message("user", "Who are you?"),)
    from tunesmith.conversation import Conversation

    whole = chat([Conversation(asked)], max_tokens=30)[0]
    assert "".join(chat.stream(asked, max_tokens=30)).strip() == whole != ""
    stream = chat.stream(asked, max_tokens=30)
    next(stream)
    stream.close()  # the reader leaves: nothing goes on for nobody
    chat.decoder.step()
    assert not chat.decoder.busy()
