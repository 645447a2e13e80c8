"""Make the reference (docs/commands.md, settings.md, data-findings.md, metrics.md, events.md, errors.md, python-api.md) and the
help pages of all commands from the code.

`--check` fails when one is not current.

    python tools/pages.py

The help pages are files so that help needs no imports: `train --help` takes 2 times a bare interpreter, not 5.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import tunesmith
from sayings import Sayings, has_words
from tunesmith import errors as tree
from tunesmith.backends import BACKENDS
from tunesmith.cli import COMMANDS, HELP_WIDTH, help_page
from tunesmith.data.findings import ORDER, table
from tunesmith.evaluation import likelihood, rowreport, stats, tasks
from tunesmith.evaluation.asking import Options
from tunesmith.evaluation.diagnosis import ANSWERS, PITFALLS
from tunesmith.evaluation.metric import Metric
from tunesmith.recipe import FACTS, Field, Recipe, fields
from tunesmith.settings import expected

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "docs" / "settings.md"
FINDINGS = SETTINGS.with_name("data-findings.md")
METRICS = SETTINGS.with_name("metrics.md")
SOURCE = ROOT / "src" / "tunesmith"
TOPICS = {  # of errors, by the modules that raise them: the first that fits
    **dict.fromkeys(("data.", "preparing.", "tokens.", "cli.data.", "cli.convert.", "cli.stats."), "Data"),
    **dict.fromkeys(("models.", "render.", "local.model.", "local.adapters."), "Models and templates"),
    **dict.fromkeys(("recipe.", "settings.", "planning.", "preflight.", "cli.options."), "Settings"),
    **dict.fromkeys(("exporting.", "cli.export.", "cli.push.", "cli.test."), "Export and push"),
    **dict.fromkeys(("evaluation.",), "Evaluation"),
    **dict.fromkeys(("hosted.", "remote.", "cli.rescue."), "Services"),
    **dict.fromkeys(("server.", "cli.serve."), "Serving"),
    "": "Training and runs",
}
VALUES = {  # of settings that are text of a certain kind
    "columns": "names of columns",
    "provider": f"one of {', '.join(BACKENDS)}",
    "chat_template": "model, chat, instruct, completion, or a file",
    "warmup_steps": "a whole number, 0 or more",
}
SFT = {
    "max_length",
    "max_seq_length",
    "chat_template_path",
}  # TRL's, which is not installed; the second in older versions
VERDICTS = f"""
# Metrics

What `tunesmith evaluate` measures, by `--task`. Made from the tables in `src/tunesmith/evaluation/`. How to use it:
[guides/evaluating.md](guides/evaluating.md).

## Verdicts

Both models are judged on the same held-out rows. A metric is computed from sums over rows, and the difference is tuned - base.

- **Interval**: {100 * stats.LEVEL:.0f} %, by the expanded percentile bootstrap (Efron 1979; Hesterberg 2015): in each of
  {stats.RESAMPLES:,} samples as many rows are drawn with replacement, the same for both models. Where the differences have a long
  tail, widened to the end of Hall's transformed t (1992), which corrects for skewness.
- **Test**: paired permutation (Fisher 1935): in each of {stats.RESAMPLES:,} trials base and tuned change places in a row by the
  throw of a coin.
- **Verdict**: *better* or *worse* where the interval excludes zero, p is at most {stats.SURE}, and there are {stats.FEWEST} rows
  at least; else *cannot tell*. Of two models that are equally good, about {100 * stats.SURE:.0f} % of test sets say so.
- **Rows needed** would settle it in {100 * stats.POWER:.0f} % of cases, if difference and spread are those seen.
  **Detectable** is the difference that would be found in {100 * stats.POWER:.0f} % of cases on rows like these.

The verdict of the whole is that of one metric, the first of these that there is: your own (`--metric`); the loss (per byte
where the two models do not count tokens alike); chrF, where a service tells no likelihoods. The other metrics explain it. Each
has its own error: of thirty that measure nothing, one looks like something.

Rows of which a metric says nothing are left out of it, for both models. What is marked *none* has no interval and no verdict.
"""
NOTES = {  # what is to be said of a task's metrics beside their table
    "domain": "To be read beside the perplexity and chrF of every task.",
    "persona": "Reported with any task where the run has a persona, mined from its training answers or given by `--persona`.",
    "compression": f"Reported with any task where the references have {tasks.EMOJI} emoji each in the mean, or rows name "
    "`original_tokens` in their metadata.",
    "custom": "Only those of every task, and your own: `--metric` takes a function or a regular expression, whose mean over "
    "answers decides.",
}
RETURNED = (  # by the functions of the Python API, and what these hold
    ("evaluation.result", "Evaluation", "Comparison", "Sample", "Persona", "Canary", "Diagnosis"),
    ("evaluation.rowreport", "RowReport", "RowFinding"),
    ("evaluation.judgement", "Judgement"),
    ("exporting.export", "Exported"),
    ("exporting.parity", "Certificate", "Check"),
    ("data.check", "Loaded"),
    ("evaluation.rates", "Advice"),
    ("planning", "Plan", "Prepared"),
    ("models", "ModelFacts"),
    ("data.stats", "Bill"),
    ("exporting.push", "Pushed"),
    ("remote.rescue", "Rescued"),
)
SHORT = (  # names of types in signatures
    ("Splits", "data.split"),
    ("Progress", "data.scan"),
    ("Event", "runs"),
)
INTERNAL = (
    "append",
    "events_with_offsets",
    "lock",
    "log_size",
)  # methods of a Run that only the loop needs
MEASURES = ("name", "better", "range", "definition", "source")  # the head of their tables
BESIDE = (  # what a report prints that is no row of a metric's table
    (
        "loss on general text (nats per token)",
        "lower",
        "0 and up, in nats per token",
        "The canary: the mean of -ln p over the tokens of general text; per byte where the two models do not count tokens alike.",
        "Cross-entropy, Shannon 1948",
    ),
    (
        "loss on the starter's questions (nats per token)",
        "lower",
        "0 and up, in nats per token",
        "The canary: the same over the answers to plain questions that the starter was never trained on.",
        "Cross-entropy, Shannon 1948",
    ),
    (
        "identity probes",
        "none",
        "0 to the number asked",
        "Of questions such as who it is, without a system prompt, those answered with the persona's name, by base and tuned; "
        "asked where there is a persona. None is a training row's prompt.",
        "Tunesmith",
    ),
)
DIAGNOSES = (
    "What went wrong, by name; a healthy run has none. Those about answers need "
    f"{ANSWERS} of them, those about curves the run's own evaluation."
)


def pages() -> dict[Path, str]:
    """Every made file with its text."""
    made = {SETTINGS: settings(), FINDINGS: findings(), METRICS: metrics()}
    others = {"commands": commands(), "events": events(), "errors": errors(), "python-api": python_api()}
    made |= {SETTINGS.with_name(f"{name}.md"): text for name, text in others.items()}
    return {**made, **{help_page(name): help_text(name) for name in COMMANDS}}


def help_text(name: str) -> str:
    """What the command's own parser prints for --help."""
    os.environ["COLUMNS"] = str(HELP_WIDTH)
    module, _, function = COMMANDS[name][0].partition(":")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        getattr(import_module(f"tunesmith.cli.{module}"), function)(["--help"])
    return out.getvalue()


def settings() -> str:
    lines = [
        "# Settings",
        "",
        "Each is a flag of `train` and `plan`, a key of a `--config` file, and a keyword of `ts.train`. Made from `recipe.py`; "
        "where `auto` follows a rule of `facts/auto.toml`, it stands there too: by training rows, those of rates by parameters. "
        "A task sets some otherwise (`facts/tasks`), as a preset does. In the last column: "
        "in whose settings a name is found too (transformers, peft, TRL, OpenAI's fine-tuning jobs).",
    ]
    with (FACTS / "auto.toml").open("rb") as stream:
        rules = tomllib.load(stream)
    elsewhere = _elsewhere()
    group = ""
    for field in fields().values():
        if field.group != group:
            group = field.group
            lines += [
                "",
                f"## {group}",
                "",
                "| flag | default | value | unit | meaning | the name is that of |",
                "|---|---|---|---|---|---|",
            ]
        names = ", ".join(f"`--{n.replace('_', '-')}`" for n in (field.name, *field.aliases))
        default = (
            ""
            if field.default in (None, {})
            else f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
        )
        value = VALUES.get(field.name) or expected(field)
        meaning = field.help + _rule(rules.get(field.name, {}))
        lines.append(_row(names, default, value, field.unit, meaning, _namesakes(field, elsewhere)))
    return "\n".join(lines) + "\n"


def _elsewhere() -> dict[str, set[str]]:
    """Names of settings by who has them, as the libraries that are here tell themselves."""
    from inspect import signature

    from openai.types.fine_tuning.job_create_params import Hyperparameters, JobCreateParams
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    made = {"TrainingArguments": TrainingArguments, "LoraConfig": LoraConfig, "BitsAndBytesConfig": BitsAndBytesConfig}
    found = {name: set(signature(made_by).parameters) for name, made_by in made.items()}
    return found | {
        "SFTConfig": SFT,
        "OpenAI": {*JobCreateParams.__annotations__, *Hyperparameters.__annotations__} - {"method"},
    }  # dpo there


def _namesakes(field: Field, elsewhere: dict[str, set[str]]) -> str:
    """Which other programs call a setting by its name, or by another that is taken too; else it is Tunesmith's own."""
    names = [(who, name) for who, known in elsewhere.items() for name in (field.name, *field.aliases) if name in known]
    return ", ".join(f"{who} `{name}`" for who, name in names) or "Tunesmith"


def _rule(rule: dict[str, object]) -> str:
    """What a setting's auto becomes, of the rules in facts/auto.toml."""
    steps = {"": rule} if "steps" in rule else {k: v for k, v in rule.items() if isinstance(v, dict) and "steps" in v}
    said = []
    for name, one in steps.items():
        parts = [
            f"{step['value']:g} over that"
            if step["up_to"] == float("inf")
            else f"{step['value']:g} up to {step['up_to']:,.0f}"
            for step in one["steps"]
        ]
        said.append(f"auto{f' of {name}' if name else ''}: {', '.join(parts)} ({one['reason']})")
    return "".join(f"; {text}" for text in said)


def findings() -> str:
    lines = [
        "# Data findings",
        "",
        "What `tunesmith data check`, `plan` and `train` may report. Codes are stable. Errors stop a run (exit status 3); "
        "warnings and notes are shown and",
        "recorded in the run's `data/check.json`. [How a data set is graded and split](data-rules.md). Made from "
        "`facts/findings.toml`.",
        "",
        "| code | severity | meaning | what to do |",
        "|---|---|---|---|",
    ]
    for code, known in sorted(table().items(), key=lambda one: (ORDER.index(one[1]["severity"]), one[0])):
        others = [f"{value} for {key}" for key, value in known.items() if key not in ("severity", "meaning", "fix")]
        severity = "; ".join([known["severity"], *others])
        lines.append(_row(f"`{code}`", severity, known["meaning"], known["fix"]))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def metrics() -> str:
    every = (*likelihood.METRICS, likelihood.PER_BYTE, tasks.CHRF)
    parts = [VERDICTS.strip(), "## Every task\n\n" + _measures(every)]
    parts.append("## Beside the metrics\n\n" + _table(MEASURES, BESIDE))
    for name, own in tasks.TASKS.items():
        shown = [m for m in own if m not in every]
        note = [NOTES[name]] if name in NOTES else []
        parts.append("\n\n".join([f"## {name}", *note, *([_measures(shown)] if shown else [])]))
    head = f"## Diagnoses\n\n{DIAGNOSES}\n\n| name | said when |\n|---|---|\n"
    parts.append(head + "\n".join(_row(*pair) for pair in PITFALLS.items()))
    head = "## Codes of the row report\n\nFor `tunesmith data convert --drop-codes`.\n\n| code | meaning |\n|---|---|\n"
    parts.append(head + "\n".join(_row(f"`{code}`", meaning) for code, meaning in rowreport.CODES.items()))
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join([_row(*head), "|" + "---|" * len(head), *(_row(*row) for row in rows)])


def _measures(chosen: Iterable[Metric]) -> str:
    rows = ((m.name, "none" if m.whole else m.better, m.span, m.about, m.source) for m in chosen)
    return _table(MEASURES, rows)


def commands() -> str:
    """The help of each command, as it prints it."""
    lines = [
        "# Commands",
        "",
        "What `tunesmith COMMAND --help` prints. Results go to stdout, progress and errors to stderr.",
    ]
    lines += ["Exit status: 0 ok, 1 failed, 2 usage, 3 data, 130 interrupted. `--json` prints one object for scripts."]
    for name in COMMANDS:
        lines += ["", f"## {name}", "", "```text", help_text(name).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def events() -> str:
    with (FACTS / "events.toml").open("rb") as stream:
        known = tomllib.load(stream)
    lines = [
        "# Events",
        "",
        "A run's `events.jsonl`: one object a line, in the order in which things happened; only ever added to. "
        "`tunesmith runs events RUN` prints it. Each has `type` and `time` (seconds since 1970). Made from `facts/events.toml`.",
    ]
    for name, event in known.items():
        lines += ["", f"## {name}", "", event["meaning"][0].upper() + event["meaning"][1:] + "."]
        if event["fields"]:
            lines += ["", "| field | meaning |", "|---|---|"]
            lines += [_row(f"`{field}`", meaning) for field, meaning in event["fields"].items()]
    return "\n".join(lines) + "\n"


def errors() -> str:
    """Every error that the source raises, with its fix."""
    lines = [
        "# Errors",
        "",
        "An error is one line: `error: PLACE: MESSAGE -- FIX`. What stands in braces is filled in. What the system says of a "
        "file stands as it says it (`File exists`, `Permission denied`), with *check the path and the disk*.",
    ]
    lines += ["", "```text", _tree(), "```"]
    topics: dict[str, dict[tuple[str, str, str], None]] = {title: {} for title in TOPICS.values()}
    for file in sorted(SOURCE.rglob("*.py")):
        module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        title = next(title for start, title in TOPICS.items() if f"{module}.".startswith(start))
        topics[title] |= dict.fromkeys(_raised(ast.parse(file.read_text(encoding="utf-8"))))
    for title, found in topics.items():
        lines += ["", f"## {title}", "", "| error | message | what to do |", "|---|---|---|"]
        lines += [_row(*row) for row in sorted(found, key=lambda row: row[1].lower())]
    return "\n".join(lines) + "\n"


def _tree() -> str:
    """The tree of errors with their exit statuses."""
    return str(tree.__doc__).split("\n\n", 1)[1].strip()


def _raised(tree_of_file: ast.Module) -> Iterator[tuple[str, str, str]]:
    kinds = {
        name for name, kind in vars(tree).items() if isinstance(kind, type) and issubclass(kind, tree.TunesmithError)
    }
    said = Sayings(tree_of_file)
    for node, inside in said.calls:
        if isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
            fix = next((k.value for k in node.keywords if k.arg == "fix"), None)
            for message, mend in said.together(node.args[0], fix, inside):
                if has_words(message) or ": " in message and has_words(mend):
                    yield node.func.id, message, mend


def python_api() -> str:
    """Signatures and docstrings of what `import tunesmith as ts` offers."""
    lines = [
        "# Python API",
        "",
        "What `import tunesmith as ts` offers. Names load when they are first used. What functions return "
        "is below them, and at the end the errors that they raise.",
    ]
    for name in tunesmith.__all__:
        value = getattr(tunesmith, name)
        if isinstance(value, type) and issubclass(value, tree.TunesmithError):
            continue
        lines += ["", f"## ts.{name}", ""]
        if callable(value):
            shown = "(*, SETTING=…)" if value is Recipe else _signature(value)  # its settings have a page of their own
            lines += ["```text", f"{name}{shown}", "```", "", _prose(inspect.getdoc(value))]
            if value is Recipe:
                lines += ["", "All of them: [settings.md](settings.md)."]
            if value is tunesmith.evaluate:
                lines += ["", "Options:", "", *_fields(Options)]
            if inspect.isclass(value) and value is not Recipe and hasattr(value, "__struct_fields__"):
                lines += ["", *_fields(value)]
        methods = vars(value).items() if inspect.isclass(value) else ()
        for method, function in methods:
            public = inspect.isfunction(function) and not method.startswith("_") and method not in INTERNAL
            if public and function.__doc__:
                about = _prose(inspect.getdoc(function)).replace("\n", " ")
                lines += ["", f"- `.{method}{_signature(function)}`: {about}"]
    for place, *names in RETURNED:
        for name in names:
            kind = getattr(import_module(f"tunesmith.{place}"), name)
            lines += ["", f"## {name}", "", _prose(inspect.getdoc(kind)), "", *_fields(kind)]
    lines += ["", "## Names of types", "", *(_alias(name, place) for name, place in SHORT)]
    lines += ["- `Conversations`: a list of them, or of a large data set what acts as one and stays on disk"]
    about = "All are attributes of `ts`; each has `message`, `where` and `fix`. What they say: [errors.md](errors.md)."
    lines += ["", "## Errors", "", about, "", "```text", _tree(), "```"]
    return "\n".join(lines) + "\n"


def _fields(kind: type) -> list[str]:
    """The fields of a struct, each with what its line of the source says of it."""
    lines = re.findall(r"^    ((\w+): .+?)  # (.+)$", inspect.getsource(kind), re.M)
    found = {name: f"- `{declared}`: {about}" for declared, name, about in lines}
    return [found[name] for name in kind.__struct_fields__]  # type: ignore[attr-defined]


def _alias(name: str, place: str) -> str:
    """What a type's short name stands for, as its line of the source says it."""
    text = (SOURCE / f"{place.replace('.', '/')}.py").read_text(encoding="utf-8")
    value, about = re.search(rf"^{name} = (.+?)(?:  # (.+))?$", text, re.M).groups()  # type: ignore[union-attr]
    return f"- `{name}`: `{value}`{f', {about}' if about else ''}"


def _signature(value: object) -> str:
    try:
        shown = str(inspect.signature(value)).replace("tunesmith.", "")  # type: ignore[arg-type]
        shown = re.sub(
            r"(: |-> )(['\"])(.*?)\2(?=[,)= ]|$)", r"\1\3", shown
        )  # annotations are texts; defaults keep quotes
        return re.sub(r"<(?:function|factory)[^=]*?>+(?=[,)])", "…", shown)  # a function's address is never the same
    except ValueError:
        return "(…)"


def _prose(doc: str | None) -> str:
    """A docstring as Markdown: what is drawn by indentation stays so."""
    parts = (doc or "").split("\n\n")
    return "\n\n".join(f"```text\n{part}\n```" if part.startswith("  ") else part for part in parts)


def main() -> None:
    for path, text in pages().items():
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not current: run tools/pages.py")


if __name__ == "__main__":
    main()
