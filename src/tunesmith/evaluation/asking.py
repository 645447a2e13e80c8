"""What the two models of an evaluation are asked, and for what each question is."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence

import msgspec

from tunesmith.conversation import Conversation, Message
from tunesmith.data.convert import sample
from tunesmith.data.scan import conversations
from tunesmith.data.split import prompt_key
from tunesmith.errors import DataError, UsageError
from tunesmith.evaluation import code, rowreport
from tunesmith.evaluation.observe import Ask
from tunesmith.evaluation.sides import Sides, asked_in
from tunesmith.models import STARTER
from tunesmith.recipe import FACTS
from tunesmith.runs import Run

SAMPLED = 16  # prompts that are answered several times
TAUGHT = 64  # training rows whose prompts the base answers, for the classifier of styles


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How an evaluation is done: the options of `ts.evaluate`."""

    task: str | None = None  # whose metrics; None: the run's own
    rows: int = 100  # prompts that are answered; 0: none
    samples: int = 4  # further answers to some prompts, and to each row that has tests
    weighed: int = 1000  # rows of all splits that the row report looks at; 0: there is none
    max_tokens: int | None = None  # of an answer; None: room for twice the longest reference, 256 at most
    metric: str | None = None  # one's own: "FILE.py:function" or "re:PATTERN"; its mean decides
    persona: str | None = None  # a name that the tuned model should give
    judge: str | None = None  # address of a service whose model compares the answers
    judge_model: str | None = None  # its name
    judge_key_file: str | None = None  # a file with the key
    seed: int = 0  # of which prompts are answered, and of the resampling

    def check(self) -> None:
        """UsageError where what is said of a judge does not go together."""
        fix = "--judge URL --judge-model NAME"
        if bool(self.judge) != bool(self.judge_model):
            raise UsageError("a judge has an address and a model", where="--judge", fix=fix)
        if self.judge_key_file and not self.judge:
            raise UsageError("a judge's key, and no judge", where="--judge-key-file", fix=fix)
        if self.judge and not self.rows:
            raise UsageError("a judge needs answers", where="--judge", fix="--rows 100")


class Asked(msgspec.Struct, frozen=True):
    """What both models are asked, and for what: of the questions the first are identity probes, the others the starter's; of the
    canary rows the first are general text. `taught`: training rows whose prompts the base answers."""

    base: Ask
    tuned: Ask
    name: str
    probes: list[Conversation]
    general: int
    starter: list[Conversation]
    taught: list[Conversation]
    candidates: rowreport.Candidates | None


def asking(run: Run | None, pair: Sides, how: Options, scored: bool, own: bool) -> Asked:
    """All questions of an evaluation. `scored`: likelihoods can be had; `own`: it is the run's own, with a report on its rows."""
    rows = pair.rows
    able = [i for i, row in enumerate(rows) if row.prompt() and row.answer().strip()]
    if not scored and not able:
        raise DataError("nothing to ask: the rows have no prompt with an answer", fix="evaluate on rows with both")
    answered = sample(able, how.rows, how.seed) if 0 < how.rows < len(able) else able if how.rows else []
    tests = [i for i in answered if code.test_of(rows[i])]
    sampled = sorted({*tests, *answered[:SAMPLED]}) if how.samples else []
    who = how.persona or (str(run.recipe().persona) if run else "none")
    probes = _probes(run) if who not in ("none", "auto") else []
    with (FACTS / "canary.toml").open("rb") as stream:
        known = tomllib.load(stream)
    text = [Conversation((Message("text", t),)) for t in known["text"]] if scored else []
    questions = list(conversations(str(STARTER / "heldout.jsonl")))[: known["questions"]] if scored else []
    starter = questions[: known["answered"]] if how.rows else []
    base = Ask(
        rows,
        answered,
        sampled,
        how.samples,
        shuffled=scored,
        questions=[*probes, *(Conversation(q.prompt()) for q in starter)],
        canary=[*text, *questions],
        max_tokens=how.max_tokens or _room(rows),
        seed=how.seed,
    )
    taught = _taught(run, how.seed) if run and probes and answered else []
    weighs = run if own and scored and how.weighed else None
    found = rowreport.candidates(weighs, how.seed, bool(answered), how.weighed) if weighs else None
    tuned = msgspec.structs.replace(base, suspects=found.held(), recited=found.recited) if found else base
    base = msgspec.structs.replace(base, suspects=found.rows if found else [], recited=taught)
    return Asked(base, tuned, who, probes, len(text), starter, taught, found)


def _room(rows: Sequence[Conversation]) -> int:
    """Tokens for an answer twice as long as the longest reference: half a token a byte, where most text has a quarter."""
    return min(256, max(64, max((len(row.answer().encode()) for row in rows), default=0) // 2))


def _probes(run: Run | None) -> list[Conversation]:
    """The identity probes that no training row asks word for word."""
    with (FACTS / "probes.toml").open("rb") as stream:
        texts = tomllib.load(stream)["identity"]
    probes = {
        prompt_key(Conversation((Message("user", text), Message("assistant", "-")))): Conversation(
            (Message("user", text),)
        )
        for text in texts
    }
    trained = asked_in(run.path, ("train",), set(probes)) if run else set()
    return [probe for key, probe in probes.items() if key not in trained]


def trained(run: Run) -> list[Conversation]:
    """The rows that a run was trained on."""
    path = run / "data" / "train.jsonl"
    return list(conversations(str(path))) if path.exists() else []


def _taught(run: Run, seed: int) -> list[Conversation]:
    found = [row for row in trained(run) if row.prompt() and row.answer().strip()]
    return sample(found, TAUGHT, seed) if len(found) > TAUGHT else found
