"""docs/coming-from/fine-tune.md: each row of its tables is typed, and shows what it does."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, STARTER, rows, write
from pages import Page, Row
from shapes import shaped
from training import fit, losses, weights
from tunesmith import api, cli
from tunesmith.conversation import Conversation, Message
from tunesmith.errors import Interrupted
from tunesmith.evaluation import tasks
from tunesmith.evaluation.metric import Facts, Heard, Said
from tunesmith.models import linear_modules, shapes
from tunesmith.runs import Run

page = Page("fine-tune.md")
SAMPLES = ROOT / "src" / "tunesmith" / "assets" / "data"
CHAT, CODE, INSTRUCT, DOMAIN = "chat_chat_data", "code_code_data", "instruct_instruct_data", "domain_domain_data"
SHORT = ("--rows", "4", "--samples", "0", "--max-tokens", "16")
TURNS = [("Hello!", "Hi, I'm Nova."), ("Who are you?", "I'm Nova, and I answer.")]


# ---- the guide's folder


def talks(count: int) -> list[dict[str, Any]]:
    """Conversations of two turns each, of a speaker who has a name."""
    return [
        {
            "messages": [
                {"role": role, "content": f"{text} {i}"}
                for pair in TURNS
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        }
        for i in range(count)
    ]


def copied(source: Path, target: Path, **config: Any) -> Path:
    """A model's folder with another configuration."""
    shutil.copytree(source, target)
    known = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**known, **config}))
    return target


@pytest.fixture(scope="module")
def guide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the guide's commands name."""
    folder = tmp_path_factory.mktemp("guide")
    base = copied(tiny, folder / "base_model", max_position_embeddings=4096)
    shutil.copytree(tiny, folder / "short_model")
    shutil.copytree(base, folder / "no_template")
    (folder / "no_template" / "chat_template.jinja").unlink()
    (folder / "05_model_training" / "checkpoints").mkdir(parents=True)
    shutil.copytree(STARTER, folder / "05_model_training" / "checkpoints" / "final_model")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "chat_data.jsonl").write_bytes((SAMPLES / "chat.jsonl").read_bytes())
    for name in ("code", "instruct", "domain"):
        (folder / f"{name}_data.jsonl").write_bytes((SAMPLES / f"{name}.jsonl").read_bytes())
    write(folder / "chat_data.jsonl", talks(60))
    for name, count in {"data": 60, "large_dataset": 64, "test_data": 120, "my_data": 60, "many_rows": 3000}.items():
        write(folder / f"{name}.jsonl", rows(count))
    write(folder / "production.jsonl", [{"prompt": f"Are you open on day {i}?", "completion": "No."} for i in range(8)])
    write(folder / "tickets.jsonl", [{"QUESTION": r["prompt"], "ANSWER": r["completion"], "id": 1} for r in rows(40)])
    write(folder / "long_rows.jsonl", [*rows(40), {"prompt": "Long?", "completion": "word " * 2200}])
    write(folder / "bad_data.jsonl", [*rows(12), {"prompt": "No answer?", "completion": ""}])
    with (folder / "bad_data.jsonl").open("a") as stream:
        stream.write("{not json\n")
    (folder / "mine.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    (folder / "rows.jsonl").write_text(page.block("Rows"), encoding="utf-8")
    (folder / "fine_tuning_config.toml").write_text(page.block("A configuration of your own"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(guide: Path) -> Callable[[str], Path]:
    """The guide's runs, each trained when it is first asked for."""

    def run(name: str) -> Path:
        folder = guide / "fine_tuned_models" / name
        if not folder.exists():
            first = guide / "05_model_training" / "checkpoints" / "final_model"
            model = first if name == CHAT else guide / "base_model"
            data = (
                guide / "datasets" / "chat_data.jsonl" if name == CHAT else guide / f"{name.split('_')[0]}_data.jsonl"
            )
            fit(folder, data, model, task=name.split("_")[0], max_steps=6, eval_steps=2, epochs=3)
        return folder

    return run


@pytest.fixture
def here(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's files in the test's own folder. What evaluations keep of a base serves all tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(guide / "cache"))
    for path in guide.iterdir():
        if path.name not in ("fine_tuned_models", "cache"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def own(request: pytest.FixtureRequest) -> None:
    """Asked for by a test whose training is done by processes of its own."""


@pytest.fixture(autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a worker does is done in this process: starting one takes longer than the few steps here."""
    from tunesmith.local import backend, machine, worker

    def resume(_: Any, run: Run, step: int | None = None) -> None:
        run.append("state", state="queued")
        worker.main(str(run), False, step)

    if "own" not in request.fixturenames:
        monkeypatch.setattr(backend.LocalBackend, "resume", resume)
        monkeypatch.setattr(machine, "tune", lambda: None)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def linked(source: str, target: str) -> None:
    """Weights as links, which nothing here writes into; the rest as copies."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


@pytest.fixture
def do(typed: Any, here: Path, made: Callable[[str], Path]) -> Callable[..., Any]:
    """Type a row's command where the guide's files and the run that it names are."""

    def run(row: Row | str, *more: object, status: int | None = 0) -> Any:
        line = row if isinstance(row, str) else row.command
        if (name := re.search(r"fine_tuned_models/(\w+)", line)) and not (here / name[0]).exists():
            shutil.copytree(made(name[1]), here / name[0], copy_function=linked)
        return typed(line, *more, status=status)

    return run


@pytest.fixture
def trained(do: Callable[..., Any]) -> Callable[..., Run]:
    """The run that a row's command makes."""
    return lambda row, *more: Run(do(row, *more).out.strip())


@pytest.fixture
def planned(do: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The plan that a row's command makes."""
    return lambda row, *more: json.loads(do(row, "--json", *more).out)


@pytest.fixture(scope="module")
def evaluated(
    made: Callable[[str], Path], guide: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Row], dict[str, Any]]:
    """What a row's `tunesmith evaluate RUN --json` says; what several rows have in common is typed once."""
    said: dict[str, dict[str, Any]] = {}

    def result(row: Row) -> dict[str, Any]:
        command = row.command
        if command not in said:
            import contextlib
            import io

            words, out = shlex.split(command)[1:], io.StringIO()
            made(Path(words[1]).name)
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
                patch.chdir(guide)
                patch.setenv("XDG_CACHE_HOME", str(guide / "cache"))
                assert cli.main([*words, *SHORT]) == 0, command
            said[command] = json.loads(out.getvalue())
        return said[command]

    return result


def metrics(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {m["metric"]: m for m in result["metrics"]}


def figure(
    task: str, name: str, reference: str, answer: str, ask: str = "Do it.", ended: bool = True, **more: Any
) -> Any:
    """What a metric is of one answer."""
    metric = next(m for m in tasks.TASKS[task] if m.name == name)
    row = Conversation((Message("user", ask), Message("assistant", reference)), metadata=more)
    assert metric.columns
    found = metric.columns(row, Heard(said=Said(answer, ended)), Facts())
    return found and found[0] / found[1]


def recipe(run: Run) -> dict[str, Any]:
    return dict(run.manifest()["recipe"])


def kept(run: Run, side: str = "train") -> list[dict[str, Any]]:
    """A side's rows as the run has them."""
    return [json.loads(line) for line in (run / "data" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()]


def rates(run: Run) -> list[float]:
    return [e["lr"] for e in run.metrics("step")]


def hub_data(name: str, items: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rows stand for a data set of the Hub, in a cache as `datasets` leaves it."""
    import datasets

    short = name.rpartition("/")[2]
    (folder / "made" / short).mkdir(parents=True)
    write(folder / "made" / short / "data.jsonl", items)
    cache = folder / "datasets-cache"
    datasets.load_dataset(str(folder / "made" / short), cache_dir=str(cache))
    (cache / short).rename(cache / name.replace("/", "___"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


# ---- quick start


@page.does("`fine_tune.py --task chat`")
def test_the_first_command(row: Row, trained: Callable[..., Run], own: None, here: Path) -> None:
    """By a worker of its own, as it is typed; a second run stands beside the first."""
    from transformers import AutoModelForCausalLM

    run = trained(row, "--max-steps", "2")
    assert run.path == Path("fine_tuned_models/chat_chat_data") and run.state() == "succeeded"
    assert [e["step"] for e in run.metrics("step")] == [1, 2] and losses(run)[0] > 0
    for folder in (run / "final_model", run / "best_model", run.path):
        assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 6e6
    assert api.prepare(dataset="datasets/chat_data.jsonl", model="starter").plan.rows["train"] == 44
    from tunesmith.layout import output_path

    assert output_path(run.recipe()).name == "chat_chat_data-2"


@page.does("`--output-dir ./fine_tuned_models`")
def test_the_output_directory_is_the_run(row: Row, trained: Any, do: Any, here: Path) -> None:
    run = trained(row, "--max-steps", "1")
    assert run.path == Path("fine_tuned_models") and (here / "fine_tuned_models" / "final_model").is_dir()
    again = do(row, status=2)
    assert "holds another run" in again.err and "--runs-dir" in again.err and again.err.count("\n") == 1


@page.does("`fine_tune.py --task instruct --lora --lora-rank 16`")
def test_a_hub_data_set_with_lora(row: Row, trained: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        {"instruction": f"Say {i}.", "input": "", "output": f"word{i}", "text": f"Below is … Say {i}."}
        for i in range(40)
    ]
    hub_data("tatsu-lab/alpaca", items, here, monkeypatch)
    run = trained(row, "--max-steps", "2")
    assert run.path == Path("fine_tuned_models/instruct_alpaca")
    turns = [m["content"] for row in kept(run) for m in row["messages"]]
    assert run.manifest()["plan"]["rows"] == {"train": 32, "valid": 4, "test": 4} and "Below is" not in " ".join(turns)
    adapter = json.loads((run / "final_model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32) and recipe(run)["method"] == "lora"


@page.does("`--dataset alpaca-instruct`")
def test_a_name_that_is_none(row: Row, do: Any) -> None:
    said = do(row, status=3)
    assert "alpaca-instruct: neither a file here" in said.err and "hf download --repo-type dataset" in said.err
    assert said.err.count("\n") == 1


@page.does("`fine_tune.py --task code`")
def test_a_hub_data_set_of_code(row: Row, trained: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        {"code": f"def f{i}():\n    return {i}\n", "repo_name": "a/b", "path": "f.py", "language": "Python", "size": 9}
        for i in range(40)
    ]
    hub_data("codeparrot/github-code", items, here, monkeypatch)
    run = trained(row, "--max-steps", "2")
    plan = run.manifest()["plan"]
    assert run.path.name == "code_github-code" and plan["rows"]["train"] == 32
    assert plan["supervised_tokens"]["train"] > 0.8 * plan["tokens"]["train"]
    assert all(re.fullmatch(r"def f\d+\(\):\n    return \d+\n", row["text"]) for row in kept(run))


@page.does("`--base-model ./05_model_training/checkpoints/final_model`")
def test_the_base_model(row: Row, planned: Any, do: Any, guide: Path) -> None:
    plan = planned(row)
    assert Path(plan["model"]["folder"]).samefile(guide / "05_model_training" / "checkpoints" / "final_model")
    assert plan["model"]["parameters"] > 6e6
    other = row.command.replace("--base-model", "--model")
    assert json.loads(do(other, "--json").out)["model"] == plan["model"]
    missing = do(row.command.replace("final_model", "no_model"), status=None)
    assert missing.code and "no such model folder" in missing.err


@page.does("a base model in `pytorch_model.bin`")
def test_pickled_weights(row: Row, do: Any, here: Path, tiny: Path) -> None:
    """Refused; after the page's program the same model is there."""
    import torch
    from transformers import AutoModelForCausalLM

    assert "(#weights-as-safetensors)" in row.here
    shutil.copytree(tiny, here / "old_model")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    (here / "old_model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), here / "old_model" / "pytorch_model.bin")
    line = "tunesmith plan --dataset data.jsonl --base-model ./old_model --no-probe"
    refused = do(line, status=None)
    assert refused.code and "no safetensors weights" in refused.err and "pickled ones are never loaded" in refused.err
    exec(page.block("Weights as safetensors"), {})
    assert json.loads(do(line, "--json").out)["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(here / "old_model")
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


# ---- tasks


@page.does("chat: optimises for conversation")
def test_the_task_chat(row: Row, planned: Any) -> None:
    plan = planned(row)
    assert plan["recipe"]["task"] == "chat" and plan["recipe"]["persona"] == "Nova"
    assert planned(row.command.replace("--task chat", ""))["recipe"]["task"] == "chat"
    for task in ("code", "instruct", "domain"):
        other = planned(row.command.replace("--task chat", f"--task {task}"))
        assert other["recipe"]["persona"] == "none"
        assert other["recipe"]["learning_rate"] == plan["recipe"]["learning_rate"] and other["rows"] == plan["rows"]


@page.does("chat: multi-turn dialogue formatting")
def test_every_turn_is_learnt(row: Row, do: Any) -> None:
    learnt = re.findall(r"⟦(.*?)⟧", do(row).out, re.S)
    assert len(learnt) == 2
    for part, (ask, answer) in zip(learnt, TURNS, strict=True):
        assert part.startswith(answer) and "<|im_end|>" in part and ask not in part


@page.does("chat: response diversity metrics", "Comprehensive evaluation: task-specific metrics and monitoring")
def test_diversity(row: Row, evaluated: Any) -> None:
    found = metrics(evaluated(row))
    assert {"distinct-1", "distinct-2", "self-repetition"} <= set(found)
    assert found["self-repetition"]["low"] is not None
    dull, varied = "so it is so it is so it is so it is", "we open at nine and close again by six"
    assert figure("chat", "distinct-1", "x", dull) < figure("chat", "distinct-1", "x", varied)
    assert figure("chat", "self-repetition", "x", dull) > figure("chat", "self-repetition", "x", varied)


@page.does("code: generation and completion")
def test_the_task_code(row: Row, planned: Any) -> None:
    plan = planned(row)
    assert plan["recipe"]["chat_template"] == "completion" and "task code" in plan["origin"]["chat_template"]
    assert planned(row.command.replace("no_template", "base_model"))["recipe"]["chat_template"] == "model"


@page.does("code: multiple programming languages")
def test_eight_languages(row: Row, evaluated: Any) -> None:
    from tunesmith.evaluation.code import valid
    from tunesmith.evaluation.syntax import languages

    assert "syntax validity" in metrics(evaluated(row))
    good = {
        "python": "x = 1",
        "javascript": "let x = 1;",
        "typescript": "let x: number = 1;",
        "go": "package a\n\nvar x = 1\n",
        "rust": "fn f() -> i32 { 1 }",
        "java": "class A { int x = 1; }",
        "c": "int x = 1;",
        "cpp": "class A { int x; };",
    }
    assert {*good, "tsx"} == set(languages())  # TypeScript's other dialect
    for language, text in good.items():
        ask = Conversation((Message("user", "?"), Message("assistant", text)), metadata={"language": language})
        assert valid(ask, text) is True, language
        assert valid(ask, text + " ) ((") is False, language
    assert valid(Conversation((Message("user", "?"),), metadata={"language": "cobol"}), "x") is None


@page.does("code: syntax consistency metrics", "code: pattern consistency")
def test_patterns(row: Row, evaluated: Any) -> None:
    result = evaluated(row)
    assert result["task"] == "code" and "pattern consistency" in metrics(result)
    reference = "def f(a):\n    return a + 1"
    near, far = (
        figure("code", "pattern consistency", reference, answer, language="python")
        for answer in ("def g(b):\n    return b + 2", "import os\nprint(os)")
    )
    assert near == 1 and far < 0.6


@page.does("instruct: follows specific instructions")
def test_the_task_instruct(row: Row, planned: Any, do: Any) -> None:
    plan = planned(row)
    assert plan["recipe"]["chat_template"] == "instruct" and plan["recipe"]["persona"] == "none"
    shown = do(
        "tunesmith data preview ./instruct_data.jsonl --model ./no_template --chat-template instruct --rows 1"
    ).out
    assert "### Instruction" in shown and "### Response" in shown


@page.does("instruct: various instruction formats")
def test_formats_are_told(row: Row, do: Any, here: Path) -> None:
    (here / "instruct_data.jsonl").unlink()
    mixed = [{"instruction": f"Do {i}.", "output": f"Done {i}."} for i in range(30)]
    mixed += [{"instruction": f"Take {i}.", "input": "this", "output": f"Taken {i}."} for i in range(30)]
    write(here / "instruct_data.jsonl", [*mixed, *rows(30)])
    said = do(row).out
    assert "instruction: 60 rows, known by instruction and output; also read: input" in said
    assert "prompt-completion: 30 rows" in said
    write(here / "instruct_data.jsonl", [{"instruction": "Do it.", "answers": "Done."}])
    assert "unknown-columns" in do(row, status=3).out


@page.does("instruct: adherence metrics", "instruct: instruction adherence")
def test_constraints(row: Row, evaluated: Any) -> None:
    assert metrics(evaluated(row))["constraints kept"]["rows"] >= 1
    ask, reference = "Answer in exactly two sentences.", "It is open. Come in."
    held, broken = (
        figure("instruct", "constraints kept", reference, answer, ask)
        for answer in ("It is closed. Do not come.", "It is closed.")
    )
    assert (held, broken) == (1, 0)


@page.does("domain: specialises for a domain")
def test_the_task_domain(row: Row, trained: Any) -> None:
    run = trained(row, "--max-steps", "2")
    assert run.path.name == "domain_domain_data" and recipe(run)["task"] == "domain"
    assert weights(run / "final_model") != weights(run.path.parent.parent / "base_model")


@page.does("Task-specific optimizations: tailored configurations")
def test_what_a_task_sets(row: Row, planned: Any) -> None:
    plans = {task: planned(row.command.replace("--task domain", f"--task {task}")) for task in ("domain", "chat")}
    by_task = {name for name, origin in plans["domain"]["origin"].items() if "task domain" in origin}
    assert by_task == {"chat_template", "warmup_ratio", "persona"}
    for name in ("learning_rate", "batch_size", "epochs"):
        assert plans["domain"]["recipe"][name] == plans["chat"]["recipe"][name]


@page.does("domain: medical, legal, etc.")
def test_any_field_has_terms(row: Row, evaluated: Any, made: Any) -> None:
    from tunesmith.evaluation.domain import mine_terms

    assert "term recall" in metrics(evaluated(row))
    terms = json.loads((made(DOMAIN) / "evaluation" / "facts.json").read_text())["terms"]
    assert {"brood", "hive", "queen"} <= set(terms)  # the sample's field is keeping bees
    said = {
        "pericardial effusion": "The dyspnoea of patient {} points to a pericardial effusion, so an echocardiogram is done.",
        "repudiatory breach": "The indemnity of clause {} survives a repudiatory breach, so the lessee may go to court.",
    }
    for term, answer in said.items():
        assert term in mine_terms([answer.format(n) for n in range(8)])
    german = "Die Haftung aus Absatz {} besteht auch nach einer Kündigung fort, und der Mieter kann Ersatz verlangen."
    assert mine_terms([german.format(n) for n in range(8)]) == []


@page.does("domain: extended training")
def test_a_domain_warms_up_longer(row: Row, planned: Any) -> None:
    plan, chat = planned(row), planned(row.command.replace("--task domain", "--task chat"))
    assert plan["recipe"]["warmup_ratio"] == 0.15 > chat["recipe"]["warmup_ratio"]
    assert plan["origin"]["warmup_ratio"] == "task domain"
    assert plan["recipe"]["epochs"] == chat["recipe"]["epochs"] == 10
    assert planned(row, "--epochs", "30")["steps"] == 3 * plan["steps"]


@page.does("domain: vocabulary enhancement")
def test_terms(row: Row, evaluated: Any, made: Any, guide: Path) -> None:
    result = evaluated(row)
    assert "term recall" in metrics(result)
    facts = json.loads((made(DOMAIN) / "evaluation" / "facts.json").read_text())
    assert len(facts["terms"]) >= 5
    metric = next(m for m in tasks.TASKS["domain"] if m.name == "term recall")
    term = facts["terms"][0]
    ask = Conversation((Message("user", "?"), Message("assistant", f"It is the {term}.")))
    assert metric.columns
    for answer, recall in ((f"The {term}!", 1), ("Nothing.", 0)):
        found = metric.columns(ask, Heard(said=Said(answer)), Facts(terms=[term]))
        assert found and found[0] / found[1] == recall
    sizes = {
        shapes(folder)["model.embed_tokens.weight"][0]
        for folder in (made(DOMAIN) / "final_model", guide / "base_model")
    }
    assert len(sizes) == 1


@page.does("custom: flexible configuration")
def test_a_file_with_every_setting(row: Row, do: Any, here: Path) -> None:
    from tunesmith.recipe import fields

    do(row)
    text = (here / "custom.toml").read_text()
    assert all(re.search(rf"^#? ?{name} =", text, re.M) for name in fields())
    changed = re.sub(r"^# ?seed = .*$", "seed = 7", text, flags=re.M)
    assert changed != text
    (here / "custom.toml").write_text(changed)
    plan = json.loads(do("tunesmith plan --config custom.toml --base-model ./base_model --no-probe", "--json").out)
    assert plan["recipe"]["seed"] == 7 and plan["origin"]["seed"] == "custom.toml"


@page.does("custom: customisable data formatting")
def test_own_columns_and_template(row: Row, trained: Any) -> None:
    run = trained(row, "--max-steps", "2")
    template = (run / "final_model" / "chat_template.jinja").read_text()
    assert template.startswith("{% for m in messages %}<{{ m.role }}>")
    first = kept(run)[0]["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"] and first[0]["content"].startswith("Question number")


@page.does("custom: general-purpose metrics")
def test_own_metric(row: Row, do: Any) -> None:
    said = do(row, *SHORT).out
    assert re.search(r"^verdict: .* by matches \[\.!\?\]\$", said, re.M)
    assert all(name in said for name in ("perplexity", "token accuracy", "calibration error", "chrF"))
    assert "distinct" not in said and "syntax" not in said


# ---- methods


def changed_weights(run: Run, base: Path) -> set[str]:
    """Names of the weights that are others than the base's."""
    import torch
    from safetensors.torch import load_file

    first, last = load_file(base / "model.safetensors"), load_file(run / "final_model" / "model.safetensors")
    return {name for name in first if not torch.equal(first[name], last[name])}


@page.does("full fine-tuning")
def test_full(row: Row, trained: Any, guide: Path) -> None:
    run = trained(row, "--max-steps", "2")
    assert changed_weights(run, guide / "base_model") == set(shapes(guide / "base_model"))
    assert run.last("state") and next(e for e in run.events() if e.get("trainable"))["trainable"] == sum(
        math.prod(shape) for shape in shapes(guide / "base_model").values()
    )


@page.does("full: best for significant task shifts")
def test_full_beside_adapters(row: Row, do: Any, guide: Path, here: Path) -> None:
    for word, method in zip(shlex.split(row.command)[3:5], ("full", "lora"), strict=True):
        fit(here / word, guide / "domain_data.jsonl", guide / "base_model", task="domain", method=method, max_steps=4)
    said = do(row).out
    assert re.search(r"^ *method +full +lora", said, re.M) and "validation loss (nats per token)" in said
    assert (here / "compare.html").exists()


@page.does("full: requires more compute and memory", "Efficient training: memory-optimized techniques")
def test_the_plan_measures(row: Row, planned: Any) -> None:
    plan = planned(row)
    need = plan["estimate"]
    assert 100 < need["memory_mb"] < need["available_mb"] and need["seconds"] > 0 and plan["ways_to_fit"] == []
    lora = planned(row, "--lora", "--no-probe")
    assert lora["trainable_parameters"] < plan["trainable_parameters"] and lora["memory_mb"] < plan["memory_mb"]
    assert lora["estimate"] is None


@page.does("`--lora --lora-rank 8`")
def test_lora(row: Row, trained: Any, guide: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    run = trained(row, "--max-steps", "2")
    adapter = json.loads((run / "final_model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (8, 16)
    assert {name.rpartition(".")[2] for name in adapter["target_modules"]} == linear_modules(guide / "base_model")
    model = AutoPeftModelForCausalLM.from_pretrained(run / "final_model")
    added = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(added) == 2 * 2 * 7 and not (run / "final_model" / "model.safetensors").exists()


@page.does("LoRA: memory efficient")
def test_lora_needs_less(row: Row, planned: Any) -> None:
    plan, full, four = (planned(row.command.replace("--lora", how)) for how in ("--lora", "", "--method qlora"))
    assert plan["trainable_parameters"] < full["trainable_parameters"] / 5
    assert four["memory_mb"] <= plan["memory_mb"] < full["memory_mb"]


@page.does("LoRA: maintains base model performance", "general knowledge is maintained")
def test_the_canary(row: Row, evaluated: Any) -> None:
    from tunesmith.evaluation.diagnosis import FORGOT, Evidence, diagnose
    from tunesmith.evaluation.result import Canary
    from tunesmith.evaluation.stats import Comparison

    found = evaluated(row)["canary"]["metrics"]
    assert [m["metric"].partition(" (")[0] for m in found] == [
        "loss on general text",
        "loss on the starter's questions",
    ]
    assert FORGOT == 0.1
    for loss, said in ((1.05, []), (1.3, ["loss of general capability"])):
        worse = Comparison("loss on general text (nats per token)", 1.0, loss, loss - 1, 0.01, 0.4, 0.001, "worse", 24)
        names = [d.name for d in diagnose(Evidence("better", {}, canary=Canary([worse], [])))]
        assert names == said


@page.does("`--freeze-ratio 0.7`")
def test_freezing(row: Row, trained: Any, guide: Path) -> None:
    """0.7 of two layers: the lower one."""
    run = trained(row, "--max-steps", "2")
    changed = changed_weights(run, guide / "base_model")
    assert changed == {n for n in shapes(guide / "base_model") if "layers.1." in n or n == "model.norm.weight"}


@page.does("freezing: balance between efficiency and adaptation")
def test_frozen_layers_are_computed_once(row: Row, trained: Any) -> None:
    run = trained(row, "--runs-dir", "cached")
    caches = [e for e in run.events() if e["type"] == "prefix_cache"]
    assert {e["side"] for e in caches} >= {"train"} and run.metrics("step")[-1]["epoch"] == 2
    plain = trained(row, "--no-prefix-cache", "--runs-dir", "plain")
    assert not [e for e in plain.events() if e["type"] == "prefix_cache"]
    assert losses(plain) == pytest.approx(losses(run), rel=1e-4)


@page.does("freezing: good for similar tasks")
def test_how_near_a_task_is(row: Row, trained: Any, guide: Path, here: Path) -> None:
    far = trained(row, "--max-steps", "2").metrics("eval")[0]
    first = fit(here / "first", guide / "data.jsonl", guide / "base_model", epochs=6, learning_rate=1e-2)
    near = trained(row.command.replace("./base_model", str(first.path)), "--max-steps", "2").metrics("eval")[0]
    assert far["step"] == near["step"] == 0 and near["loss"] < 0.7 * far["loss"]


# ---- configuration


@page.does("`--config quick_test`")
def test_quick_test(row: Row, trained: Any) -> None:
    run = trained(row)
    assert run.metrics("step")[-1]["step"] == 20 < run.manifest()["plan"]["steps_per_epoch"]
    assert (recipe(run)["epochs"], recipe(run)["patience"]) == (1, 0)
    assert run.manifest()["origin"]["max_steps"] == "preset quick_test"
    assert len(trained(row, "--max-steps", "1").metrics("step")) == 1


@page.does("`--config low_resource`")
def test_low_resource(row: Row, trained: Any) -> None:
    run = trained(row, "--max-steps", "2")
    assert json.loads((run / "final_model" / "adapter_config.json").read_text())["r"] == 4
    assert recipe(run)["gradient_checkpointing"] and recipe(run)["batch_size"] == 1
    assert run.manifest()["plan"]["steps_per_epoch"] == math.ceil(run.manifest()["plan"]["rows"]["train"] / 8)


@page.does("`--config high_quality`")
def test_high_quality(row: Row, trained: Any) -> None:
    """A rate that ruins the model: five validations without gain, and it ends."""
    run = trained(row, "--learning-rate", "0.3")
    assert recipe(run)["epochs"] == 20 and run.last("done")["stopped_early"]
    best = [e["step"] for e in run.metrics("eval") if e["step"] and e["best"]][-1]
    assert len([e for e in run.metrics("eval") if e["step"] > best]) == 5
    warm = rates(run)
    assert warm.index(max(warm)) + 1 == math.ceil(0.15 * run.manifest()["plan"]["steps"])


@page.does("`--config production`")
def test_production(row: Row, planned: Any) -> None:
    plan, default = planned(row), planned(row.command.replace("--config production", ""))
    assert plan["rows"]["test"] == 13 and default["rows"]["test"] == 7
    assert (plan["recipe"]["save_total_limit"], plan["recipe"]["weight_decay"], plan["recipe"]["nproc"]) == (5, 0.05, 1)


@pytest.fixture(scope="module")
def configured(guide: Path) -> tuple[Run, str]:
    """The run of the page's Python program, to its end, and what its plan warns of."""
    import contextlib
    import io

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(guide), contextlib.redirect_stdout(out):
        from tunesmith.local import backend, worker

        patch.setattr(backend.LocalBackend, "resume", lambda _, run, step=None: worker.main(str(run), False, step))
        exec(page.block("The same from Python"), {})
    state, best = out.getvalue().split()
    assert state == "succeeded" and (guide / best).is_dir()
    return Run(guide / Path(best).parent), out.getvalue()


@page.does("`FineTuningConfig(…)` in `configs/fine_tuning_config.py`")
def test_the_configuration(row: Row, trained: Any, do: Any, here: Path, configured: tuple[Run, str]) -> None:
    """The file and the program make the same run; a wrong key is named."""
    run = trained(row)
    assert losses(run) == losses(configured[0]) and weights(run / "final_model") == weights(
        configured[0] / "final_model"
    )
    (here / "fine_tuning_config.toml").unlink()
    (here / "fine_tuning_config.toml").write_text("learning_rat = 1e-5\n")
    assert 'unknown setting "learning_rat" (did you mean "learning_rate"?)' in do(row, status=2).err


def keys_act(run: Run) -> dict[str, Callable[[], bool]]:
    """What each key of the guide's configuration shows of itself in a run of 48 training rows."""
    plan, step, evals = run.manifest()["plan"], run.metrics("step"), run.metrics("eval")
    saved = [e for e in run.events() if e["type"] == "checkpoint"]
    return {
        "learning_rate": lambda: rates(run)[0] == pytest.approx(1e-5 / 500),
        "num_epochs": lambda: step[-1]["epoch"] == 5,
        "per_device_train_batch_size": lambda: plan["steps_per_epoch"] == 48 / (4 * 2),
        "gradient_accumulation_steps": lambda: len(step) == 5 * 48 / (4 * 2),
        "warmup_steps": lambda: rates(run) == pytest.approx([1e-5 * (i + 1) / 500 for i in range(30)]),
        "eval_steps": lambda: [e["step"] for e in evals] == [0, 30],
        "save_steps": lambda: [e["step"] for e in saved] == [30],
        "max_length": lambda: recipe(run)["max_length"] == 2048,
    }


@page.does(
    "`learning_rate=1e-5`", "`num_epochs=5`", "`per_device_train_batch_size=4`", "`gradient_accumulation_steps=2`",
    "`warmup_steps=500`", "`eval_steps=100`", "`save_steps=500`", "`max_length=2048`",
)  # fmt: skip
def test_each_key(row: Row, configured: tuple[Run, str], do: Any, here: Path) -> None:
    run = configured[0]
    (key,) = tomllib.loads(row.code[0])
    assert row.there == f"`{row.code[0].replace(' = ', '=')}`"
    assert tomllib.loads(row.code[0])[key] == tomllib.loads(page.block("A configuration of your own"))[key]
    assert keys_act(run)[key]()
    line = "tunesmith plan --dataset ./data.jsonl --base-model ./base_model --no-probe --config one.toml"
    (here / "one.toml").write_text(row.code[0] + "\n")
    if key == "warmup_steps":
        assert "[long-warmup]" in do(line, "--max-steps", "500").out
        assert "[long-warmup]" not in do(line, "--epochs", "50", "--batch-size", "4").out  # 600 steps
    if key == "max_length":
        line = line.replace("data.jsonl", "long_rows.jsonl")
        assert "over 2048 tokens" in do(line, status=3).err
        assert do(line, "--over-long", "truncate").out.count("their ends are cut") == 1


# ---- data


ROWS = {
    "`{\"messages\": […]}`": ("Hello!", "Hi! How can I help you?"),
    "`{\"prompt\": …, \"response\": …}`": ("What is machine learning?", "Machine learning is..."),
    "`{\"instruction\": …, \"input\": …, \"output\": …}`": ("Translate to French\n  | \n  | Hello world", "Bonjour le monde"),
    "`{\"instruction\": …, \"output\": …}`": ("Summarize this text", "This is a summary..."),
    "`{\"prompt\": …, \"completion\": …}`": ("Write a function to sort a list", "def sort_list(lst):"),
    "`{\"code\": …}`": ("", "class DataProcessor:"),
}  # fmt: skip


@page.does(*ROWS)
def test_each_format(row: Row, do: Any) -> None:
    ask, answer = ROWS[row.there]
    said = do(row).out
    before, _, learnt = said.partition("⟦")
    assert ask in before and learnt.startswith(answer) and said.count("⟦") == 1
    if not ask:
        assert before.rstrip().endswith("learnt\n  |") and "pass" in learnt.partition("⟧")[0]


@page.does("`scripts/validate_dataset.py --dataset ./my_data.jsonl --task chat`")
def test_validation(row: Row, do: Any, here: Path) -> None:
    assert re.search(r"60 usable, 0 errors", do(row).out)
    shutil.copy(here / "bad_data.jsonl", here / "my_data.tmp")
    (here / "my_data.jsonl").unlink()
    (here / "my_data.tmp").rename(here / "my_data.jsonl")
    said = do(row, status=3).out
    assert "my_data.jsonl:13: " in said and "my_data.jsonl:14: " in said
    assert do("tunesmith data check ./my_data.jsonl --task chat", status=3).out == said
    do(row, "--fix", "fixed.jsonl", status=3)
    assert len((here / "fixed.jsonl").read_text().splitlines()) == 13
    assert "needs a data set" in do("tunesmith data check", status=2).err


# ---- advanced


@page.does("distributed fine-tuning")
def test_two_processes(row: Row, trained: Any, own: None, guide: Path, here: Path) -> None:
    run = trained(row, "--max-steps", "2")
    assert next(e for e in run.events() if e.get("state") == "running")["processes"] == 2
    alone = fit(here / "alone", guide / "large_dataset.jsonl", guide / "base_model", config="production", max_steps=2,
                epochs="auto", batch_size="auto", learning_rate="auto")  # fmt: skip
    assert losses(alone) == pytest.approx(losses(run), rel=1e-4)


@page.does("`accelerate launch fine_tune.py`")
def test_accelerate(row: Row, here: Path) -> None:
    assert "(#several-gpus)" in row.here
    words = shlex.split(page.block("Several GPUs").replace("\\\n", " "))
    assert words[:2] == ["accelerate", "launch"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *words[2:], "--max-steps", "2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    run = Run(here / done.stdout.strip())
    assert run.path == here / "fine_tuned_models" / "chat_large_dataset" and run.state() == "succeeded"
    assert next(e for e in run.events() if e.get("state") == "running")["processes"] == 2
    assert recipe(run)["save_total_limit"] == 5


@page.does("`--gradient-checkpointing`")
def test_recomputed(row: Row, trained: Any) -> None:
    run, plain = (
        trained(row, "--max-steps", "2"),
        trained(row.command.replace("--gradient-checkpointing", ""), "--max-steps", "2"),
    )
    assert losses(run) == losses(plain) and weights(run / "final_model") == weights(plain / "final_model")
    assert run.manifest()["plan"]["memory_mb"] < plain.manifest()["plan"]["memory_mb"]
    assert recipe(run)["max_length"] == 4096


@page.does("`--max-length 4096`")
def test_beyond_the_context(row: Row, do: Any) -> None:
    assert "max_length 4096 is over the model's context of 512" in do(row, status=3).err
    assert do(row.command.replace("short_model", "base_model"), "--no-probe").code == 0


@page.does("`--mixed-precision bf16`")
def test_bf16(row: Row, trained: Any) -> None:
    run, plain = trained(row, "--max-steps", "2"), trained(row.command.replace("bf16", "no"), "--max-steps", "2")
    assert losses(run) != losses(plain) and losses(run) == pytest.approx(losses(plain), rel=0.02)


@page.does("`--resume checkpoint-step-1000`")
def test_resume_a_step(row: Row, do: Any, here: Path) -> None:
    """A run that was stopped; its checkpoint is given the number that the guide has."""
    import hashlib

    folder = here / "fine_tuned_models" / "chat_data"
    asked: list[int] = []
    with pytest.raises(Interrupted):
        stopped(folder, lambda: asked.append(1) or len(asked) == 3, max_steps=1002, epochs=100)
    checkpoint = folder / "checkpoints" / "checkpoint-step-1000"
    (folder / "checkpoints" / "checkpoint-step-3").rename(checkpoint)
    trainer = (
        (checkpoint / "trainer.json")
        .read_text()
        .replace('"step": 3', '"step": 1000')
        .replace('"step":3', '"step":1000')
    )
    (checkpoint / "trainer.json").write_text(trainer)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["trainer.json"] = hashlib.sha256(trainer.encode()).hexdigest()
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    refused = do(row, "--learning-rate", "0.5", status=2)
    assert "another result than that of the run" in refused.err
    do(row)
    run = Run(folder)
    assert run.last("resumed")["step"] == 1000 and run.state() == "succeeded"
    assert [e["step"] for e in run.metrics("step")][-2:] == [1001, 1002]
    assert "no checkpoint-step-7 here" in do(row.command.replace("step-1000", "step-7"), status=None).err


def stopped(folder: Path, stop: Callable[[], bool], **settings: Any) -> None:
    from tunesmith.local.backend import lay_out
    from tunesmith.local.loop import train

    how = {"batch_size": 4, "learning_rate": 1e-3, "threads": 1, **settings}
    train(lay_out(api.prepare("data.jsonl", model="base_model", **how), folder), stop)


# ---- monitoring


@page.does("loss curves")
def test_curves(row: Row, do: Any, here: Path) -> None:
    said = do(row).out
    assert "○ validation  ● its lowest" in said and re.search(r"validation loss\n  step +loss\n +0 ", said)
    run = Run(here / "fine_tuned_models" / CHAT)
    assert len(losses(run)) == 6
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "logs"))
    board.Reload()
    assert [s.value for s in board.Scalars("train/loss")] == pytest.approx(losses(run))
    assert {"train/lr", "train/grad_norm", "valid/loss"} <= set(board.Tags()["scalars"])


@page.does("learning rate schedules")
def test_schedules(row: Row, do: Any, trained: Any) -> None:
    shown = [float(x) for x in re.findall(r"\blr (\S+)", do(row).out)]
    assert len(shown) == 6 and shown[0] >= shown[-1]
    line, runs = (
        "tunesmith train --dataset ./data.jsonl --base-model ./base_model --warmup-steps 0 --learning-rate 1",
        {},
    )
    for shape in ("cosine", "linear", "constant"):
        runs[shape] = rates(trained(f"{line}e-4 --lr-scheduler {shape}", "--max-steps", "4"))
    assert runs["constant"] == [1e-4] * 4 and runs["linear"] == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])
    assert runs["cosine"] == pytest.approx([1e-4 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


@page.does("gradient norms")
def test_norms(row: Row, do: Any, trained: Any) -> None:
    events = [json.loads(line) for line in do(row).out.splitlines()]
    assert len(events) == 6 and all(e["grad_norm"] > 0 for e in events)
    line = "tunesmith train --dataset ./data.jsonl --base-model ./base_model --max-grad-norm"
    clipped, free = (trained(f"{line} {limit}", "--max-steps", "3") for limit in ("0.01", "0"))
    assert clipped.metrics("step")[0]["grad_norm"] == free.metrics("step")[0]["grad_norm"] > 0.01
    assert weights(clipped / "final_model") != weights(free / "final_model")


@page.does("training/validation accuracy")
def test_accuracy(row: Row, trained: Any) -> None:
    run, plain = (
        trained(row, "--max-steps", "2"),
        trained(row.command.replace("--token-accuracy", ""), "--max-steps", "2"),
    )
    for kind in ("step", "eval"):
        assert all(0 <= e["accuracy"] <= 1 for e in run.metrics(kind)) and run.metrics(kind)
        assert not [e for e in plain.metrics(kind) if "accuracy" in e]


@page.does("chat: turn coherence")
def test_coherence(row: Row, evaluated: Any) -> None:
    assert metrics(evaluated(row))["turn coherence"]["rows"] >= 4
    metric = next(m for m in tasks.TASKS["chat"] if m.name == "turn coherence")
    ask = Conversation((Message("user", "?"), Message("assistant", "x")))
    assert metric.columns
    used, ignored = (metric.columns(ask, Heard(context=(own, 9.0, 3)), Facts()) for own in (3.0, 9.0))
    assert used == (6.0, 3) and ignored == (0.0, 3)


@page.does("chat: conversation flow")
def test_flow(row: Row, evaluated: Any) -> None:
    assert {"length imbalance", "question imbalance", "end-of-turn rate"} <= set(metrics(evaluated(row)))
    reference = "We open at nine. Would you like to come?"
    for name, good, bad in (
        ("length imbalance", "We close at six. Shall I book a table?", "No."),
        ("question imbalance", "It is closed. When will you come?", "It is closed."),
    ):
        assert figure("chat", name, reference, good) < figure("chat", name, reference, bad), name
    ends = [figure("chat", "end-of-turn rate", reference, "Yes.", ended=ended) for ended in (True, False)]
    assert ends == [1, 0]


@page.does("code: syntax validity")
def test_validity(row: Row, evaluated: Any) -> None:
    assert "syntax validity" in metrics(evaluated(row))
    found = [figure("code", "syntax validity", "x = 1", answer, language="python") for answer in ("y = 2", "y = = 2")]
    assert found == [1, 0]


@page.does("code: code completion accuracy")
def test_completion(row: Row, evaluated: Any) -> None:
    assert "code completion accuracy" in metrics(evaluated(row))
    found = [
        figure("code", "code completion accuracy", "x = f(1)\ny = 2", answer, language="python")
        for answer in ("x = f(1)\n\ny = 2\n", "x = f(2)\ny = 2")
    ]
    assert found == [1, 0]


@page.does("instruct: task completion rate")
def test_completed(row: Row, evaluated: Any) -> None:
    assert "completion rate" in metrics(evaluated(row))
    ask, reference = "Name three colours.", "Red, green and blue."
    wrong = ("", "Name three colours.", "I'm sorry, but I can't help with that.")
    assert figure("instruct", "completion rate", reference, "Red, blue, grey.", ask) == 1
    assert [figure("instruct", "completion rate", reference, answer, ask) for answer in wrong] == [0, 0, 0]
    assert figure("instruct", "completion rate", reference, "Red, blue", ask, ended=False) == 0


@page.does("instruct: response quality")
def test_quality(row: Row, evaluated: Any, do: Any) -> None:
    assert {"ROUGE-L", "chrF"} <= set(metrics(evaluated(row)))
    reference = "Red, green and blue."
    for name in ("ROUGE-L", "chrF"):
        near, far = (figure("instruct", name, reference, answer) for answer in ("Red, green, blue.", "Open at nine."))
        assert near > far, name
    asked = do(row.command, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", *SHORT, status=None)
    assert asked.code and "127.0.0.1:9" in asked.err + asked.out  # a judge is really asked


@page.does("`--eval-steps 50 --save-steps 200`")
def test_frequent_evaluation(row: Row, trained: Any) -> None:
    """200 steps, of one row each."""
    run = trained(row, "--max-steps", "200", "--batch-size", "1", "--patience", "0")
    assert [e["step"] for e in run.metrics("eval")] == [0, 50, 100, 150, 200]
    saved = [e for e in run.events() if e["type"] == "checkpoint"]
    assert [e["step"] for e in saved if e["regular"]] == [200]
    best = {e["step"] for e in run.metrics("eval") if e["best"] and e["step"]}
    assert {e["step"] for e in saved} == best | {200}


# ---- best practices


@page.does("ensure high-quality, task-relevant data")
def test_quality_is_graded(row: Row, do: Any, here: Path) -> None:
    good = re.search(r"^grade: (.*?) \(", do(row).out, re.M)
    page_text = (here / "check.html").read_text()
    (here / "check.html").unlink()
    (here / "my_data.jsonl").unlink()
    spoilt = [
        {"prompt": f"Q{i}?", "completion": "As an AI language model, I cannot help with that."} for i in range(20)
    ]
    broken = [{"prompt": "CafÃ©?", "completion": "My key is sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCDEF."}]
    write(here / "my_data.jsonl", [*rows(20), *rows(20), *spoilt, *broken])
    said = do(row, status=None).out
    bad = re.search(r"^grade: (.*?) \(", said, re.M)
    assert good and bad and good[1] != bad[1] and f">{good[1]}<" in page_text
    assert {"duplicate", "refusal", "mojibake", "secret"} <= set(re.findall(r"\[([a-z-]+)\]", said))


@page.does("balance dataset size and diversity")
def test_size_and_diversity(row: Row, do: Any, here: Path) -> None:
    varied = json.loads(do(row, "--json").out)
    assert "different; " in do(row).out
    (here / "my_data.jsonl").unlink()
    write(
        here / "my_data.jsonl",
        [
            {"prompt": f"When does the museum in the old town open on day {i}?", "completion": "At nine, as ever."}
            for i in range(60)
        ],
    )
    dull = json.loads(do(row, "--json").out)
    assert dull["rows"] == varied["rows"] == 60
    assert dull["vocabulary"]["distinct_2"] < varied["vocabulary"]["distinct_2"]
    assert dull["near_duplicates"]["rows"] > 0


@page.does("validate data format before training")
def test_training_validates(row: Row, do: Any, trained: Any, here: Path) -> None:
    said = do(row, status=3)
    assert "bad_data.jsonl:13" in said.err + said.out or "bad_data.jsonl:14" in said.err + said.out
    assert not (here / "fine_tuned_models").exists()
    assert trained(row.command.replace("bad_data", "data"), "--max-steps", "1").state() == "succeeded"


@page.does("start with recommended rates per task")
def test_recommended_rates(row: Row, planned: Any, do: Any) -> None:
    plan, full = planned(row), planned(row.command.replace("--lora --lora-rank 8", ""))
    assert plan["recipe"]["learning_rate"] == 10 * full["recipe"]["learning_rate"] == 5e-3
    assert plan["origin"]["learning_rate"].startswith("auto: lora, 0.3M parameters: ")
    assert re.search(r"learning_rate +0\.005 +auto: lora", do(row).out)
    assert planned(row, "--task", "code")["recipe"]["learning_rate"] == 5e-3


@page.does("use learning rate finder")
def test_the_finder(row: Row, do: Any, here: Path) -> None:
    said = do(row, "--trial-steps", "2", "--batch-size", "8").out
    found = re.search(r"^(take|perhaps): --learning-rate (\S+)", said, re.M)
    assert found and 1e-7 < float(found[2]) < 1 and (here / "rates.svg").read_text().startswith("<svg")
    tried = {float(rate) for rate in re.findall(r"^ +\d+ +(\d\.\d+e-\d+)", said, re.M)}
    assert len(tried) == 7 and not (here / "fine_tuned_models").exists()


@page.does("consider warmup for stable training")
def test_warmup(row: Row, trained: Any, planned: Any) -> None:
    lr = rates(trained(row, "--max-steps", "4", "--learning-rate", "1e-3"))
    assert lr[:2] == pytest.approx([5e-4, 1e-3]) and lr[2] == pytest.approx(1e-3)
    plan = planned("tunesmith plan --dataset ./data.jsonl --base-model ./base_model --no-probe")
    assert plan["recipe"]["warmup_ratio"] == 0.1 and plan["steps"] == 120


@page.does("larger batches for stable gradients")
def test_larger_batches(row: Row, trained: Any, planned: Any) -> None:
    run = trained(row, "--max-steps", "3")
    assert run.manifest()["plan"]["steps_per_epoch"] == 3
    small = trained(row.command.replace("16", "1"), "--max-steps", "3")
    assert run.metrics("step")[0]["tokens"] > 8 * small.metrics("step")[0]["tokens"]
    sizes = [
        planned(f"tunesmith plan --dataset ./{name}.jsonl --base-model ./base_model --no-probe")["recipe"]["batch_size"]
        for name in ("data", "many_rows")
    ]
    assert sizes == [4, 16]


@page.does(
    "use gradient accumulation if memory-limited",
    "out of memory: `--per-device-train-batch-size 1 --gradient-accumulation-steps 8`",
)
def test_accumulation(row: Row, trained: Any) -> None:
    run = trained(row, "--max-steps", "3")
    words = dict(zip(*[iter(shlex.split(row.command)[2:])] * 2, strict=True))
    size = recipe(run)["batch_size"] * int(words["--gradient-accumulation-steps"])
    whole = trained(
        f"tunesmith train --dataset ./data.jsonl --base-model ./base_model --batch-size {size}", "--max-steps", "3"
    )
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert run.manifest()["plan"]["steps_per_epoch"] == whole.manifest()["plan"]["steps_per_epoch"] == 48 // size
    if size == 8:
        assert recipe(run)["batch_size"] == 1
        assert run.manifest()["plan"]["memory_mb"] <= whole.manifest()["plan"]["memory_mb"]


@page.does("monitor GPU utilization")
def test_speed_and_memory(row: Row, do: Any, here: Path) -> None:
    said = json.loads(do(row).out)
    assert said["tokens_per_second"] > 0 and said["peak_memory_mb"] > 0
    step = Run(here / "fine_tuned_models" / CHAT).metrics("step")[-1]
    assert step["memory_mb"] > 0 and step["tokens_per_second"] > 0 and "utilization" not in said


@page.does("use dropout for overfitting prevention")
def test_dropout(row: Row, trained: Any, here: Path) -> None:
    run, plain = trained(row, "--max-steps", "3"), trained(row.command.replace("0.1", "0"), "--max-steps", "3")
    assert json.loads((run / "final_model" / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    assert weights(run / "final_model") != weights(plain / "final_model")
    first = {}
    for share in (0.0, 0.3):
        model = shaped("gpt2", here / f"gpt{share}", resid_pdrop=share, embd_pdrop=share, attn_pdrop=0.0)
        first[share] = losses(fit(here / f"run{share}", here / "data.jsonl", model, max_steps=1))
    assert first[0.0] != first[0.3]


@page.does("apply weight decay appropriately")
def test_decay(row: Row, trained: Any) -> None:
    from safetensors.torch import load_file

    runs = [trained(row, "--max-steps", "6"), trained(row.command.replace("0.5", "0"), "--max-steps", "6")]
    large, none = (load_file(run / "final_model" / "model.safetensors") for run in runs)
    assert sum(float(w.norm()) for w in large.values() if w.ndim == 2) < sum(
        float(w.norm()) for w in none.values() if w.ndim == 2
    )
    assert (
        recipe(trained("tunesmith train --dataset data.jsonl --base-model base_model", "--max-steps", "1"))[
            "weight_decay"
        ]
        == 0.01
    )


@page.does("monitor train/validation gap")
def test_the_gap(row: Row, do: Any, here: Path, guide: Path) -> None:
    data = write(
        here / "few.jsonl", [{"prompt": f"{i}?", "completion": f"{(i * 7919) % 9973} {i * i}"} for i in range(30)]
    )
    fit(here / "overfit", data, guide / "base_model", epochs=40, learning_rate=1e-2,
        lr_scheduler="constant", patience=0, valid_fraction=0.3)  # fmt: skip
    said = do(row).out
    assert "warning: overfitting: " in said and "stop there: --epochs" in said
    assert "overfitting" not in do(f"tunesmith runs show ./fine_tuned_models/{CHAT}").out


@page.does("save checkpoints frequently")
def test_frequent_checkpoints(row: Row, trained: Any) -> None:
    from tunesmith.local.checkpoint import damage, existing

    run = trained(row, "--max-steps", "6")
    found = existing(run)
    assert [p.name for p in found] == [f"checkpoint-step-{n}" for n in (2, 4, 6)]
    assert [damage(p) for p in found] == [None] * 3
    with (found[0] / "optimizer.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert damage(found[0]) == "optimizer.safetensors has changed"


@page.does("keep best N checkpoints")
def test_best_checkpoints(row: Row, trained: Any) -> None:
    from tunesmith.local.checkpoint import existing, number

    run = trained(row, "--max-steps", "8", "--learning-rate", "0.05", "--patience", "0")
    by_loss = sorted((e["loss"], e["step"]) for e in run.metrics("eval") if e["step"])
    assert {number(p) for p in existing(run)} == {step for _, step in by_loss[:3]} | {7, 8}
    one = trained(
        row.command.replace("limit 3", "limit 1"), "--max-steps", "8", "--learning-rate", "0.05", "--patience", "0"
    )
    assert {number(p) for p in existing(one)} == {by_loss[0][1], 7, 8}


@page.does("enable checkpoint resumption")
def test_resumption(row: Row, do: Any, here: Path) -> None:
    asked: list[int] = []
    with pytest.raises(Interrupted):
        stopped(here / "stopped", lambda: asked.append(1) or len(asked) == 3, max_steps=6)
    stopped(here / "whole", lambda: False, max_steps=6)
    do(row)
    run = Run(here / "stopped")
    assert run.last("resumed")["step"] == 3 and len(losses(run)) == 6
    assert weights(run / "final_model") == weights(here / "whole" / "final_model")


@page.does("evaluate on held-out data")
def test_held_out(row: Row, do: Any, here: Path, made: Any) -> None:
    (here / "chat_data.jsonl").unlink()
    write(here / "chat_data.jsonl", kept(Run(made(CHAT)))[:8])
    refused = do(row, status=3)
    assert "train" in refused.err and refused.err.count("\n") == 1
    assert Run(made(CHAT)).manifest()["plan"]["rows"] == {"train": 44, "valid": 6, "test": 6}


@page.does("use task-specific metrics")
def test_other_metrics(row: Row, do: Any) -> None:
    said = do(row, *SHORT).out
    assert "completion rate" in said and "ROUGE-L" in said and "turn coherence" not in said


@page.does("monitor for overfitting")
def test_early_stopping(row: Row, trained: Any) -> None:
    run = trained(row)
    done = run.last("done")
    assert done["stopped_early"] and done["best_step"] < done["step"] < 20 * 12
    evals = [e for e in run.metrics("eval") if e["step"]]
    assert done["best_step"] == min(evals, key=lambda e: e["loss"])["step"]
    assert weights(run / "best_model") != weights(run / "final_model")


# ---- troubleshooting


@page.does("out of memory: `--gradient-checkpointing`")
def test_checkpointing_saves(row: Row, planned: Any) -> None:
    less, more = planned(row), planned(row.command.replace("--gradient-checkpointing", ""))
    assert less["memory_mb"] < more["memory_mb"] and less["steps"] == more["steps"]


@page.does("out of memory: `--lora --lora-rank 4`")
def test_a_small_rank(row: Row, planned: Any) -> None:
    four, sixteen, full = (
        planned(row),
        planned(row.command.replace("4", "16")),
        planned(row.command.replace("--lora --lora-rank 4", "")),
    )
    assert sixteen["trainable_parameters"] == 4 * four["trainable_parameters"]
    assert four["memory_mb"] <= sixteen["memory_mb"] < full["memory_mb"]


@page.does("slow: `--mixed-precision fp16`")
def test_fp16(row: Row, do: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import preflight

    monkeypatch.setattr(preflight, "GPUS", (str(here / "none"),))
    said = do(row, status=2)
    assert "fp16 needs a GPU, and none is here" in said.err and "use bf16" in said.err
    monkeypatch.setattr(preflight, "GPUS", (str(here),))
    plan = do(row.command.replace("train", "plan", 1), "--no-probe", "--json").out
    assert json.loads(plan)["recipe"]["mixed_precision"] == "fp16"


@page.does("slow: `--max-length 512`")
def test_shorter_rows(row: Row, trained: Any, do: Any) -> None:
    run = trained(row, "--max-steps", "2")
    plan = run.manifest()["plan"]
    assert plan["longest"] <= 512 and sum(plan["rows"].values()) == 40
    assert "over 512 tokens" in do(row.command.replace("--over-long drop", ""), status=3).err
    steps = run.metrics("step")
    assert max(e["tokens"] for e in steps) <= 4 * plan["longest"]  # no padding to 512
    assert plan["longest"] < 100


@page.does("slow: `--num-workers 8`")
def test_workers(row: Row, planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import preparing

    asked: list[int] = []
    spread = preparing.spread

    def counted(function: Any, parts: Any, processes: int, here: Any) -> Any:
        asked.append(processes)
        return spread(function, parts, processes, here)

    monkeypatch.setattr(preparing, "spread", counted)
    plan, alone = planned(row), planned(row.command.replace("8", "1"))
    assert asked == [5, 1]  # parts of 1,024 rows: three of training, one of validation, one of test
    assert plan["tokens"] == alone["tokens"] and plan["recipe"]["num_workers"] == 8


@page.does("poor: `--num-epochs 10`")
def test_epochs(row: Row, trained: Any, planned: Any) -> None:
    run = trained(row, "--batch-size", "48", "--patience", "0")
    assert run.metrics("step")[-1]["epoch"] == 10 and len(losses(run)) == 10
    line = "tunesmith plan --base-model ./base_model --no-probe --dataset"
    assert planned(f"{line} ./data.jsonl")["recipe"]["epochs"] == 10
    assert planned(f"{line} ./many_rows.jsonl")["recipe"]["epochs"] == 3


@page.does("poor: `--learning-rate 1e-6`")
def test_a_tiny_rate(row: Row, trained: Any) -> None:
    from tunesmith.evaluation.diagnosis import Evidence, diagnose

    said = {}
    for line in (row.command, row.command.replace("1e-6", "3e-3")):
        run = trained(line, "--max-steps", "24")
        said[line] = [
            d.name
            for d in diagnose(Evidence("", {}, run.metrics("step"), run.metrics("eval")))
            if d.severity == "warning"
        ]
        assert max(rates(run)) == pytest.approx(recipe(run)["learning_rate"])
    assert list(said.values()) == [["underfitting"], []]


@page.does("poor: `--lora-rank 32`")
def test_a_large_rank(row: Row, trained: Any, planned: Any) -> None:
    run = trained(row, "--max-steps", "2")
    assert json.loads((run / "final_model" / "adapter_config.json").read_text())["r"] == 32
    alone = planned(row.command.replace("train", "plan", 1).replace("--lora ", ""), "--no-probe")
    assert [i["code"] for i in alone["issues"] if i["where"] == "lora_rank"] == ["idle-setting"]


# ---- what a run leaves behind


@page.does(
    "`fine_tuned_models/chat_chat_data/`", "`final_model/`", "`final_model/pytorch_model.bin`", "`final_model/config.json`",
    "`final_model/tokenizer.json`", "`final_model/README.md`", "`best_model/`", "`checkpoints/checkpoint-step-500/`",
)  # fmt: skip
def test_output(row: Row, made: Any, guide: Path) -> None:
    from transformers import AutoModelForCausalLM

    made(CHAT)
    path = guide / row.code[0]
    run = Run(guide / "fine_tuned_models" / CHAT)
    assert path.exists()
    if row.there in ("`fine_tuned_models/chat_chat_data/`", "`final_model/`", "`best_model/`"):
        assert AutoModelForCausalLM.from_pretrained(path).num_parameters() > 6e6
    best, last = run.last("done")["best_step"], run.metrics("step")[-1]["step"]
    if row.there == "`fine_tuned_models/chat_chat_data/`":
        assert weights(path) == weights(path / "best_model")
    elif row.there == "`final_model/`":
        assert (path / "model.safetensors").samefile(
            run / "checkpoints" / f"checkpoint-step-{last}" / "model.safetensors"
        )
    elif row.there == "`best_model/`":
        assert (path / "model.safetensors").samefile(
            run / "checkpoints" / f"checkpoint-step-{best}" / "model.safetensors"
        )
    elif "pytorch_model" in row.there:
        assert not list(run.path.rglob("*.bin"))
        adapter = fit(
            guide / "adapter" / str(os.getpid()), guide / "data.jsonl", guide / "base_model", max_steps=1, method="lora"
        )
        assert (adapter / "final_model" / "adapter_model.safetensors").exists()
        assert (adapter / "final_model" / "adapter_config.json").exists()
    elif "config" in row.there:
        assert json.loads(path.read_text())["model_type"] == "llama"
    elif "tokenizer" in row.there:
        assert path.read_bytes() == (STARTER / "tokenizer.json").read_bytes()
        assert path.with_name("chat_template.jinja").read_bytes() == (STARTER / "chat_template.jinja").read_bytes()
    elif "README" in row.there:
        assert path.read_text().startswith("---\n") and "44 training rows" in path.read_text()
    else:
        there = {p.name for p in (run / "checkpoints").iterdir()}
        assert there == {f"checkpoint-step-{n}" for n in {best, 4, 6}} and (path / "optimizer.safetensors").exists()


# ---- deployment


@page.does("`scripts/test_model.py`")
def test_a_model_is_tried(row: Row, do: Any, here: Path, guide: Path) -> None:
    passed = do(row, "--max-tokens", "64").out
    assert passed.count("✓") + passed.count("!") == 8 and "✗" not in passed and "  base " in passed
    fit(here / "random", guide / "data.jsonl", guide / "base_model", max_steps=1)
    failed = do("tunesmith test --model-path ./random/final_model", "--max-tokens", "8", status=1).out
    assert "✗ answers end by themselves" in failed and "next: " in failed


@page.does("`scripts/prepare_for_deployment.py`")
def test_prepared_for_deployment(row: Row, do: Any, here: Path, monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder = here / "06_fine_tuning"
    (folder / "fine_tuned_models").mkdir(parents=True)
    shutil.copytree(made(CHAT), folder / "fine_tuned_models" / CHAT, copy_function=linked)
    monkeypatch.chdir(folder)
    (here / "fine_tuned_models").symlink_to(folder / "fine_tuned_models")
    said = do(row, "--prompts", "1").out
    exported = here / "07_deployment" / "models"
    assert "certificate: deployable" in said and AutoModelForCausalLM.from_pretrained(exported).num_parameters() > 6e6
    assert (exported / "README.md").exists() and json.loads((exported / "parity.json").read_text())["checks"]
    (exported / "chat_template.jinja").write_text("{{ messages[0].content }}")
    spoilt = do("tunesmith parity ../07_deployment/models --prompts 1", status=1).out
    assert "✗" in spoilt and "certificate: not deployable" in spoilt
    assert (exported / "NOT-DEPLOYABLE.txt").exists()


# ---- next steps


@page.does("evaluate on test set")
def test_the_test_set(row: Row, do: Any, here: Path) -> None:
    said = do(row, *SHORT).out
    test = kept(Run(here / "fine_tuned_models" / INSTRUCT), "test")
    found = re.search(r"^verdict: (better|worse|cannot tell).*, on (\d+) held-out rows", said, re.M)
    assert found and int(found[2]) == len(test)
    assert "verdict" in (here / "fine_tuned_models" / INSTRUCT / "report.html").read_text().lower()


@page.does("run inference tests")
def test_inference(row: Row, do: Any) -> None:
    said = do(row).out.strip()
    assert said and "<|im_end|>" not in said and do(row).out.strip() == said  # with --prompt the likeliest words
    assert do(row, "--max-tokens", "1").out.strip() != said


@page.does("prepare for deployment (see `07_deployment`)")
def test_gguf(row: Row, do: Any, here: Path) -> None:
    said = do(row, "--prompts", "1").out
    (file,) = (here / "exported" / "gguf").glob("*.gguf")
    assert file.read_bytes()[:4] == b"GGUF" and "certificate: deployable" in said and "llama-server -m" in said


@page.does("monitor model performance in production")
def test_production_rows(row: Row, do: Any, here: Path) -> None:
    said = do(row, *SHORT).out
    assert re.search(r"^verdict: .*, on 8 held-out rows", said, re.M)
    report = re.search(r"^report: +(\S+)", said, re.M)
    assert report and "evaluation/on-production.jsonl-" in report[1] and (here / report[1]).exists()


# ---- further pages


@page.does(
    "`docs/best_practices.md`",
    "`docs/dataset_preparation.md`",
    "`docs/lora_details.md`",
    "`docs/metrics_guide.md`",
    "`docs/FAQ.md`",
)
def test_pages(row: Row) -> None:
    found = re.fullmatch(r"\[.+\]\(\.\./(guides/[\w-]+\.md)\)", row.here)
    assert found
    text = (ROOT / "docs" / found[1]).read_text(encoding="utf-8")
    if "lora" in row.there:
        numbers_of_lora()
    if "best_practices" in row.there:
        assert len(re.findall(r"^\| \d+ \| ", text, re.M)) == 12
    if "dataset" in row.there:
        assert "| `contradiction` |" in (ROOT / "docs/data-findings.md").read_text(encoding="utf-8")
    if "metrics" in row.there:
        text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
        assert all(f"| {name} |" in text for name in ("distinct-1", "constraints kept", "pattern consistency"))


def numbers_of_lora() -> None:
    """The formula, the beginning and the factor of the page's account of LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    net = nn.Sequential(nn.Linear(6, 10))
    x = torch.randn(3, 6)
    before = net(x)
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (6 + 10)
    assert torch.equal(model(x), before)
    layer = model.base_model.model[0]
    assert layer.scaling["default"] == 2 and layer.lora_A["default"].weight.shape == (4, 6)


@page.does("open an issue in the repository")
def test_doctor(row: Row, do: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    assert "ready to train" in do(row).out
    known = metadata.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", without_peft)
    assert "missing: peft -- pip install" in do(row, status=1).out


def test_every_row_is_done() -> None:
    assert page.undone() == [] and len(page.rows) == 122
    assert not [row.there for row in page.rows.values() if not row.why]
    links = re.findall(r"\]\((\.\./[^)#]+)", page.text)
    assert links and not [link for link in links if not (ROOT / "docs" / "coming-from" / link).exists()]
