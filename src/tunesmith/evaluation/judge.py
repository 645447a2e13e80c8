"""Base against tuned in the eyes of a judge: a third model, behind any service that speaks the OpenAI protocol.

A judge likes what stands first and what is long (Zheng et al. 2023, "Judging LLM-as-a-judge"). So each pair of answers is shown
in both orders, and a side wins a row only where it wins in both; how far the verdicts followed the position and the length, and
how often they agree with the automatic ones, is told beside them. A reply that cannot be read is counted, never guessed.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import msgspec

from tunesmith.backends import Completer
from tunesmith.conversation import Conversation, Message
from tunesmith.data.scan import Progress
from tunesmith.data.write import write_jsonl
from tunesmith.errors import ServiceError
from tunesmith.evaluation.judgement import EARLIER, ORDERS, VERDICTS, Judgement, Transcript, figures
from tunesmith.hosted import address, local_address
from tunesmith.recipe import FACTS
from tunesmith.remote.many import AT_ONCE, many

if TYPE_CHECKING:
    from tunesmith.remote.service import Service

REPLY_TOKENS = 512  # three sentences and the verdict; a judge that has not come to it by then is unreadable
MALFORMED = (400, 413, 422)  # said of one request alone: it is too long for the judge, or a filter refuses its text


class _Request(msgspec.Struct, frozen=True):
    row: int
    order: str
    prompt: Conversation
    asked: str


class _Reply(msgspec.Struct, frozen=True):
    verdict: str


def judge(
    prompts: Sequence[Conversation],
    references: Sequence[str],
    base_answers: Sequence[str],
    tuned_answers: Sequence[str],
    ask: Completer,
    model: str,
    *,
    service: str = "",
    automatic: Sequence[int | None] = (),
    known: Sequence[Transcript] = (),
    seed: int = 0,
    keep: Callable[[Transcript], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judgement:
    """Have `ask`, the judge, compare the answers to each prompt in both orders; `references` as an aid, "" where there is none.

    `ask` is called from AT_ONCE threads. `automatic`: of each row -1 (base better), 0, 1 (tuned better) or None, for the
    agreement. `known`: transcripts of another time; what they answer is not asked again. `keep` is given every transcript as it
    comes, `on_progress` the number of replies and of all. Where the service fails, what it said until then is judged; raises
    its ServiceError where that is nothing.
    """
    answers = list(zip(base_answers, tuned_answers, strict=True))
    texts = ["" if not p.messages else _whole(p.messages[-1].content) for p in prompts]
    earlier = {t.asked: t for t in known if t.asked and t.read != "refused"}
    found: list[Transcript] = []
    open_ones: list[_Request] = []

    def note(row: int, order: str, reply: str, read: str, asked: str) -> None:
        lengths = (len(answers[row][0]), len(answers[row][1]))
        found.append(Transcript(row, texts[row], order, _whole(reply), read, asked, lengths))
        keep(found[-1])

    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        if answers[row][0].strip() == answers[row][1].strip():
            note(row, "equal", "", "TIE", "")
            continue
        for request in _requests(row, prompt, reference, answers[row], f"{model} {service}", seed):
            if before := earlier.get(request.asked):
                note(row, request.order, before.reply, verdict(before.reply) or "unreadable", request.asked)
            else:
                open_ones.append(request)
    failure, total = None, len(found) + len(open_ones)
    on_progress(len(found), total)
    for asked, reply in _replies(open_ones, ask, seed):
        if isinstance(reply, str):
            note(asked.row, asked.order, reply, verdict(reply) or "unreadable", asked.asked)
        elif reply.status in MALFORMED:
            note(asked.row, asked.order, str(reply), "refused", asked.asked)
        failure = failure or (reply if isinstance(reply, ServiceError) and reply.status not in MALFORMED else None)
        on_progress(len(found), total)
    if failure and not any(t.order in ORDERS for t in found):
        raise failure
    found.sort(key=lambda t: (t.row, t.order))
    return figures(found, len(prompts), model, automatic, seed, service, str(failure or ""))


def judged(
    prompts: Sequence[Conversation],
    references: Sequence[str],
    base_answers: Sequence[str],
    tuned_answers: Sequence[str],
    *,
    url: str,
    model: str,
    key_file: str | None = None,
    automatic: Sequence[int | None] = (),
    path: Path | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Judgement:
    """`judge` by a service's model. The transcripts are kept in `path` (judge.jsonl), beside those of earlier evaluations, also
    when it is interrupted, and asked for again only where they are not there yet. Raises UsageError for a wrong address or no
    key, ServiceError as `judge`."""
    from tunesmith.remote.answers import Answers

    service = _service(url, key_file, lambda text: progress(len(prompts), 0.0, text))
    if not local_address(service.base_url) and service.base_url.startswith("http:"):
        service.say(f"{service.base_url} is http: prompts, answers and key can be read on the way")
    kept: list[Transcript] = []
    known = transcripts(path) if path else []

    def tell(done: int, total: int) -> None:
        progress(len(prompts), done / max(1, total), f"asking the judge {model}")

    try:
        return judge(
            prompts,
            references,
            base_answers,
            tuned_answers,
            Answers(service, model),
            model,
            service=service.base_url,
            automatic=automatic,
            known=known,
            seed=seed,
            keep=kept.append,
            on_progress=tell,
        )
    finally:
        if path and kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            now = {t.asked for t in kept}
            earlier = [msgspec.structs.replace(t, row=EARLIER) for t in known if t.asked and t.asked not in now]
            write_jsonl(path, [*sorted(kept, key=lambda t: (t.row, t.order)), *earlier])


def greet(url: str, model: str, key_file: str | None, progress: Progress) -> None:
    """Ask the judge for a word: a wrong address, key or name is told before anything else is done. Raises as `judged`; a service
    that refuses this very request is there."""
    from tunesmith.remote.answers import Answers

    service = _service(url, key_file, lambda text: progress(0, 0.0, text))
    try:
        Answers(service, model)([Conversation((Message("user", "Say A."),))], max_tokens=1)
    except ServiceError as error:
        if error.status not in MALFORMED:
            raise


def _service(url: str, key_file: str | None, say: Callable[[str], None]) -> Service:
    from tunesmith.remote.service import Service

    service = Service(address(url, "--judge"), key_file)
    service.say = say
    return service


def transcripts(path: Path) -> list[Transcript]:
    """What is kept in a judge.jsonl, without lines that cannot be read; nothing where there is no file."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            found.append(msgspec.json.decode(line, type=Transcript))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            continue
    return found


def _requests(
    row: int, prompt: Conversation, reference: str, answers: tuple[str, str], judge: str, seed: int
) -> Iterator[_Request]:
    """The two requests of a row, with another mark each: a word that none of its texts holds, and that comes of what the row
    asks, so that the request is the same among other rows."""
    facts = _facts()
    one = len(prompt.messages) == 1
    asked = "\n\n".join(m.content if one else f"{m.role}: {m.content}" for m in prompt.messages)
    texts = {"question": _whole(asked), "reference": _whole(reference)}
    base, tuned = (_whole(answer) for answer in answers)
    for order in ORDERS:
        first, second = (base, tuned) if order == ORDERS[0] else (tuned, base)
        chance = random.Random(f"{seed} {prompt.digest()} {order}")
        mark = f"{chance.getrandbits(64):016x}"
        while any(mark in text for text in (*texts.values(), base, tuned)):
            mark = f"{chance.getrandbits(64):016x}"
        given = {"mark": mark, **texts, "first": first, "second": second}
        aid = Template(facts["reference"]).substitute(given) if texts["reference"] else ""
        said = (
            Message("system", Template(facts["system"]).substitute(given).strip()),
            Message("user", Template(facts["user"]).substitute(given, aid=aid).strip()),
        )
        digest = hashlib.sha256(msgspec.json.encode((judge, said))).hexdigest()
        yield _Request(row, order, Conversation(said), digest)


@cache
def _facts() -> dict[str, str]:
    with (FACTS / "judge.toml").open("rb") as stream:
        return tomllib.load(stream)


def _whole(text: str) -> str:
    """Text that can be sent and written: halves of characters replaced."""
    return text.encode("utf-8", "replace").decode()


def _replies(requests: list[_Request], ask: Completer, seed: int) -> Iterator[tuple[_Request, str | ServiceError]]:
    """Replies as they come, AT_ONCE at a time. After an error no more are asked for, and those on their way still come; a
    refusal of one request alone ends nothing, unless the first AT_ONCE are all refused: then it is the judge that is wrong."""
    heard = refused = 0
    failed = False

    def wanted() -> Iterator[_Request]:
        for request in requests:
            if failed:
                return
            yield request

    for request, reply in many(lambda request: _answer(request, ask, seed), wanted()):
        if isinstance(reply, str):
            heard += 1
        elif not isinstance(reply, ServiceError):
            raise reply
        elif reply.status in MALFORMED:
            refused += 1
            if not heard and refused == min(AT_ONCE, len(requests)):
                raise reply
        else:
            failed = True
        yield request, reply


def _answer(request: _Request, ask: Completer, seed: int) -> str:
    return ask([request.prompt], max_tokens=REPLY_TOKENS, temperature=0.0, seed=seed)[0]


def verdict(reply: str) -> str | None:
    """A reply's verdict: the word A, B or TIE that is all of its last line, or the "verdict" of the JSON object that is its
    last line or all of it. Capital or small letters; signs of emphasis, a full stop and code fences do not count. Else None."""
    lines = [line.strip() for line in reply.splitlines() if line.strip() and not line.strip().startswith("```")]
    if not lines:
        return None
    word = lines[-1].strip(" *_`.'\"")
    for text in (lines[-1].strip("*_`"), "\n".join(lines)):
        if text.startswith("{"):
            try:
                word = msgspec.json.decode(text, type=_Reply).verdict.strip()
                break
            except (msgspec.MsgspecError, ValueError, RecursionError):
                continue
    return word.upper() if word.upper() in VERDICTS else None
