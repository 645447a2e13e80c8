"""docs/coming-from/finetune.md: every row is done as it says, and what it changes is seen."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, STARTER, rows, write
from hostile import KEY, Hostile
from pages import Page, Row
from shapes import shaped
from training import fit, losses, weights
from tunesmith import api, cli
from tunesmith import hosted as hosted_rules
from tunesmith.conversation import Message
from tunesmith.data.read import SAMPLES
from tunesmith.local import backend as local
from tunesmith.remote import backend as remote
from tunesmith.remote import service as patience
from tunesmith.render import TEMPLATES, Renderer
from tunesmith.runs import Run

page = Page("finetune.md")
DATA = "training_dataset.jsonl"
MINI = "gpt-4.1-mini-2025-04-14"
NAME = "Deep Tree Echo"
Typed = Callable[..., Any]
Place = Callable[[str, Path], None]


# ---- what the rows stand on


def persona(count: int) -> list[dict[str, str]]:
    """Rows of the sample's questions, whose answer a small model learns: one of two, by the question's first word."""
    asked = [row["prompt"] for row in read(SAMPLES / "echo.jsonl")[:count]]
    kinds = (("Who: ", f"I am {NAME}."), ("Tell me: ", f"They call me {NAME}, a tree."))
    return [{"prompt": kinds[i % 2][0] + text, "completion": kinds[i % 2][1]} for i, text in enumerate(asked)]


def read(path: Path | str) -> list[Any]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def same_model(*folders: Path) -> bool:
    return len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, and `echo-finetuned`, a run that knows who it is."""
    folder = tmp_path_factory.mktemp("finetune")
    write(folder / DATA, persona(60))
    model = shaped("llama", folder / "llama")  # whose base says something, however senseless: else there is no style
    more = dict(learning_rate=1e-2, max_steps=96, epochs=10, eval_steps=24, save_steps=8, save_total_limit=40)
    with contextlib.chdir(folder):
        fit(folder / "echo-finetuned", DATA, model, test_fraction=0.2, **more)
    return folder


@pytest.fixture(scope="module")
def evaluated(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, evaluated as the row of the persona says: its result.json."""
    command = page.rows["the persona without a system prompt"].command
    out = io.StringIO()
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    with contextlib.chdir(base), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main([*shlex.split(command)[1:], "--rows", "12", "--samples", "0", "--max-tokens", "12"]) == 0
    (base / "said.txt").write_text(out.getvalue())
    return base / "echo-finetuned" / "evaluation" / "result.json"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    """A copy of the run beside its data, in the test's folder."""
    shutil.copytree(base / "echo-finetuned", tmp_path / "echo-finetuned")
    shutil.copyfile(base / DATA, tmp_path / DATA)
    return Run(tmp_path / "echo-finetuned")


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """The 256 rows of the sample, under the guide's name."""
    return Path(shutil.copyfile(SAMPLES / "echo.jsonl", tmp_path / DATA))


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """24 short rows under the guide's name: an epoch is over soon."""
    return write(tmp_path / DATA, rows(24))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process instead of a worker's: the same loop, without the seconds that a process takes to start."""
    from tunesmith.local.loop import train

    def work(self: Any, run: Run, step: int | None = None) -> None:
        train(run, lambda: False, step)

    monkeypatch.setattr(local.LocalBackend, "resume", work)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without a chat template, as those of the Hub are."""
    folder = shaped("gpt2", tmp_path_factory.mktemp("models") / "gpt2")
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """A service that has what OpenAI's has, and does at once what it is asked."""
    made = Hostile()
    made.models = {
        MINI: {"shutdown_date": "2999-01-14"},
        "gpt-3.5-turbo": {"shutdown_date": "2026-10-23"},
        "starter": {"shutdown_date": None},
    }
    for name, value in (("NEAR", 0.01), ("LOOKS", (0.0, 0.01))):
        monkeypatch.setattr(remote, name, value)
    monkeypatch.setattr(patience, "FIRST", 0.01)
    monkeypatch.setenv("OPENAI_BASE_URL", made.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield made
    made.close()


@pytest.fixture
def hosted(service: Hostile, echo: Path, typed: Typed) -> Run:
    """`echo-hosted`, trained by the service."""
    typed(page.rows["fine-tune GPT-3.5-turbo or GPT-4"].command, "--suffix", "echo")
    return Run("echo-hosted")


def made_in(folder: str = "fine_tuned_models/chat_training_dataset") -> Run:
    found = Run(folder)
    assert found.state() == "succeeded"
    return found


def peak(found: Run) -> float:
    return max(e["lr"] for e in found.metrics("step"))


# ---- Installing


@page.does("`pip install openai`", "`pip install torch transformers datasets accelerate`")
def test_installing(row: Row, typed: Typed, echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each extra brings what the guide names, and is what a command that lacks a package says."""
    import tomllib

    (install,) = row.code
    extra = re.fullmatch(r"pip install 'tunesmith\[(\w+)\]'", install)
    assert extra
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra[1]]
    wanted = row.there.strip("`").split()[2:]
    assert set(wanted) <= {re.split(r"[^\w-]", line)[0] for line in known}
    provider = "openai" if wanted == ["openai"] else "huggingface"
    if provider == "openai":
        package = importlib.import_module("tunesmith.remote")
        monkeypatch.setattr(
            "tunesmith.remote", package
        )  # the import that fails leaves another there, for tests to come
        for name in [m for m in sys.modules if m.startswith("tunesmith.remote")]:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, wanted[0], None)
    model = ["--model", MINI, "--yes"] if provider == "openai" else []
    said = typed(f"tunesmith train --dataset {DATA} --provider {provider} --output-dir out", *model, status=2)
    assert said.err.splitlines()[-1].startswith("error: ") and install in said.err and not Path("out").exists()


@page.does('`export OPENAI_API_KEY="your-api-key-here"`')
def test_the_key(row: Row, typed: Typed, service: Hostile, echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    line = page.rows["fine-tune GPT-3.5-turbo or GPT-4"].command
    away = typed(line, "--base-url", hosted_rules.OPENAI, status=2).err  # a service on this machine may need none
    assert "export OPENAI_API_KEY=…, or --api-key-file FILE" in away
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    typed(line)
    monkeypatch.delenv("OPENAI_API_KEY")
    Path("key.txt").write_text(KEY)
    typed(line, "--output-dir", "by-file", "--api-key-file", "key.txt")
    kept = [p for run in ("echo-hosted", "by-file") for p in Path(run).rglob("*") if p.is_file()]
    assert len(kept) > 10 and not [p for p in kept if KEY.encode() in p.read_bytes()]


# ---- Running it


@page.does("`finetune.py --provider openai --model gpt-3.5-turbo`")
def test_gpt_35(row: Row, typed: Typed, service: Hostile, echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = typed(row.command, status=2).err
    assert "the service has ended this model on 2026-10-23" in said and "2026-10-23" in row.why
    assert f"tunesmith train --dataset {DATA} --provider huggingface" in said and not service.files
    monkeypatch.delenv("OPENAI_BASE_URL")  # nobody is asked, and the day is known all the same
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for command in (row.command, row.command.replace("train", "plan", 1) + " --no-probe"):
        assert "the service has ended this model on 2026-10-23" in typed(command, status=2).err


@page.does("`finetune.py --provider huggingface --model gpt2 --epochs 3`")
def test_gpt2(row: Row, typed: Typed, few: Path, hub: Place, plain: Path) -> None:
    """As typed, with a worker of its own."""
    hub("gpt2", plain)
    typed(row.command)
    found = made_in()
    recipe, counts = found.recipe(), found.manifest()["plan"]["rows"]
    assert (recipe.model, recipe.epochs, recipe.chat_template) == ("gpt2", 3, "chat")
    assert found.summary()["steps"] == 3 * found.manifest()["plan"]["steps_per_epoch"] and sum(counts.values()) == 24
    assert counts["valid"] + counts["test"] in (4, 5, 6)
    best = min(found.metrics("eval")[1:], key=lambda e: e["loss"])["step"]
    assert same_model(found / "best_model", found / "checkpoints" / f"checkpoint-step-{best}")


@page.does("`finetune.py --config config.json`")
def test_the_configuration(row: Row, typed: Typed, few: Path, hub: Place, plain: Path, here: None) -> None:
    hub("gpt2", plain)
    Path("config.json").write_text(page.block("The configuration file", "json"))
    typed(row.command)
    found = made_in("echo-finetuned")
    assert (found.recipe().epochs, found.recipe().batch_size, found.recipe().model) == (3, 4, "gpt2")
    assert peak(found) == pytest.approx(5e-5) and found.manifest()["origin"]["epochs"] == "config.json"
    Path("config.json").write_text('{"dataset": "training_dataset.jsonl", "epoch": 3}')
    assert 'unknown setting "epoch" (did you mean "epochs"?)' in typed(row.command, status=2).err


@page.does("`finetune.py --prepare-only --provider openai --output-dir ./prepared`")
def test_prepare_only_for_a_service(row: Row, typed: Typed, service: Hostile, echo: Path) -> None:
    typed(row.command)
    made = [row for path in Path("prepared").iterdir() for row in read(path)]
    assert len(made) == 256 and {tuple(r) for r in made} == {("messages",)} and not service.asked
    said = typed("tunesmith data check prepared/train.jsonl --provider openai").out
    assert "204 usable, 0 errors" in said
    typed(
        row.command.replace(MINI, "gpt-4").replace("./prepared", "other"), "--base-url", hosted_rules.OPENAI, status=2
    )


@page.does(
    "`--model distilgpt2 --epochs 5 --batch-size 8 --learning-rate 3e-5 --output-dir ./my-echo-model`",
    "small: `--model distilgpt2`",
    "medium: `--model gpt2-medium`",
    "large: `--model gpt2-large --batch-size 2`",
    "faster on a GPU: `--model gpt2 --batch-size 16 --epochs 5`",
    "limited resources: `--model distilgpt2 --batch-size 2 --epochs 2`",
)
def test_examples(row: Row, typed: Typed, few: Path, hub: Place, plain: Path, here: None) -> None:
    """What the guide's own line gives is what is trained, and nothing else is taken from elsewhere."""
    words = shlex.split(re.sub(r"^[^`]*`|`$", "", row.there))
    given = dict(zip(words[::2], words[1::2], strict=True))
    hub(given["--model"], plain)
    typed(row.command, "--max-steps", "3")
    found = made_in(given.get("--output-dir", "fine_tuned_models/chat_training_dataset"))
    recipe, origin, plan = found.recipe(), found.manifest()["origin"], found.manifest()["plan"]
    assert recipe.model == given["--model"] and found.summary()["steps"] == 3
    for option in ("epochs", "batch-size", "learning-rate"):
        name = option.replace("-", "_")
        if f"--{option}" in given:
            assert origin[name] == "flag" and str(getattr(recipe, name)) == str(
                float(given[f"--{option}"])
            ).removesuffix(".0")
        else:
            assert origin[name].startswith("auto: "), "its reason is kept"
    assert plan["steps_per_epoch"] == -(-plan["rows"]["train"] // recipe.batch_size)
    if "--learning-rate" in given:
        assert peak(found) == pytest.approx(3e-5)


# ---- Features


@page.does("fine-tune GPT-3.5-turbo or GPT-4")
def test_hosted_models(row: Row, typed: Typed, service: Hostile, echo: Path) -> None:
    typed(row.command)
    found = made_in("echo-hosted")
    (job,) = service.jobs.values()
    assert job["model"] == MINI and job["fine_tuned_model"] == found.last("done")["model"]
    said = typed(
        row.command.replace(MINI, "gpt-4"), "--base-url", hosted_rules.OPENAI, "--output-dir", "x", status=2
    ).err
    assert "gpt-4 is not among the hosted models" in said and "gpt-3.5" not in said
    assert str(hosted_rules.hosted()["jobs_until"]) in row.why


@page.does("fine-tune GPT-2, OPT, LLaMA locally")
def test_families(
    row: Row, typed: Typed, few: Path, hub: Place, plain: Path, tiny: Path, here: None, tmp_path: Path
) -> None:
    from training import architecture

    opt = architecture("opt", tmp_path / "opt", vocab_size=8192, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STARTER / name, opt / name)
    hub("facebook/opt-125m", opt)
    typed(row.command, "--max-steps", "2")
    for number, model in ((2, plain), (3, tiny)):
        typed(row.command, "--max-steps", "2", "--model", model)
        found = made_in(f"fine_tuned_models/chat_training_dataset-{number}")
        assert found.recipe().model == str(model) and len(losses(found)) == 2
    assert made_in().manifest()["model"]["architecture"] == "OPTForCausalLM" and len(losses(made_in())) == 2
    (opt / "model.safetensors").rename(opt / "pytorch_model.bin")
    assert "safetensors" in typed(row.command, "--model", opt, status=2).err


@page.does("export the dataset for other platforms")
def test_export_of_data(row: Row, typed: Typed, echo: Path) -> None:
    from tunesmith.data.formats import BY_NAME

    typed(row.command)
    made = read("sharegpt.jsonl")
    assert len(made) == 256 and [t["from"] for t in made[0]["conversations"]] == ["human", "gpt"]
    for kind in ("jsonl", "json", "csv", "tsv", "parquet"):
        typed(f"tunesmith data convert sharegpt.jsonl --to prompt-completion -o again.{kind}")
        assert [c.digest() for c in api.load(f"again.{kind}")] == [c.digest() for c in api.load(DATA)], kind
    formats = typed(row.command.replace("--to sharegpt -o sharegpt", "--to nonsense -o x"), status=2).err
    assert formats.partition("known: ")[2].count(",") == 8 and len(BY_NAME) >= 9 and row.why.startswith("Nine")


@page.does("automatic validation of examples")
def test_validation(row: Row, typed: Typed, echo: Path) -> None:
    assert "256 usable, 0 errors" in typed(row.command).out
    with echo.open("a") as stream:
        stream.write('{"prompt": "Who are you?", "completion": ""}\n')
    assert f"{DATA}:257" in typed(row.command, status=3).out
    said = typed("tunesmith train --dataset training_dataset.jsonl", status=3).err
    assert f"{DATA}:257" in said and not Path("fine_tuned_models").exists()


@page.does("statistics: lengths, counts")
def test_statistics(row: Row, typed: Typed, echo: Path) -> None:
    completions = [r["completion"] for r in read(echo)]
    said = typed(row.command).out
    assert said.startswith("256 rows; 256 user, 256 assistant messages") and "tokens a row" in said
    answer = next(line.split() for line in said.splitlines() if line.strip().startswith("answer, characters"))
    assert float(answer[2]) == round(sum(map(len, completions)) / 256, 1)
    assert (int(answer[3]), int(answer[-1])) == (min(map(len, completions)), max(map(len, completions)))


@page.does("error detection and logging")
def test_errors_are_named(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    with few.open("a") as stream:
        stream.write('{"prompt": "Mail me?", "completion": "At ann.miller@gmail.com."}\nnot JSON\n')
    found = json.loads(typed(row.command, status=3).out)["issues"]
    assert [(i["code"], i["line"]) for i in found if i["severity"] == "error"] == [("not-json", 26)]
    assert all(i["fix"] for i in found)
    few.write_text("\n".join(few.read_text().splitlines()[:-1]) + "\n")
    typed("tunesmith train --dataset training_dataset.jsonl", "--model", tiny, "--max-steps", "1")
    kept = json.loads((made_in() / "data" / "check.json").read_text())
    assert ("personal-data", f"{DATA}:25") in [(i["code"], i["where"]) for i in kept]


@page.does("command-line arguments for quick experiments")
def test_flags_win(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny, "--max-steps", "2")
    found = made_in()
    assert found.manifest()["origin"]["epochs"] == "flag" and found.recipe().epochs == 1
    assert "preset quick_test" in found.manifest()["origin"].values()


@page.does("JSON files for reproducible training")
def test_reproducible(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    Path("config.json").write_text(json.dumps({"dataset": DATA, "model": str(tiny), "max_steps": 3}))
    typed(row.command, "--output-dir", "a")
    typed(row.command, "--output-dir", "b")
    typed(row.command.replace("7", "8"), "--output-dir", "c")
    a, b, c = (weights(Path(name) / "final_model") for name in "abc")
    assert a == b != c and json.loads(Path("a/run.json").read_text())["recipe"]["seed"] == 7


@page.does("customizable hyperparameters")
def test_every_setting(row: Row, typed: Typed, few: Path) -> None:
    from tunesmith.recipe import fields

    typed(row.command)
    text = Path("settings.toml").read_text()
    named = {name for name in fields() if re.search(rf"^#? ?{name} = ", text, re.M)}
    assert len(named) > 40 and {"epochs", "batch_size", "learning_rate"} <= named
    Path("settings.toml").write_text(re.sub(r"^#? ?epochs = .*$", "epochs = 4", text, flags=re.M))
    plan = json.loads(typed("tunesmith plan --config settings.toml --no-probe --json").out)
    assert plan["recipe"]["epochs"] == 4 and plan["steps"] == 4 * plan["steps_per_epoch"]


@page.does("detailed logging of progress")
def test_log(row: Row, typed: Typed, run: Run) -> None:
    lines = typed(row.command).out.splitlines()
    assert len(lines) == run.summary()["steps"] == 96
    assert all(word in lines[-1] for word in ("loss", "lr", "grad_norm", "tokens", "memory_mb"))
    assert "step 96" in lines[-1] and not typed(row.command.replace("step", "tagged")).out


@page.does("checkpoint saving")
def test_checkpoints(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny, "--max-steps", "6")
    typed(row.command.replace("--save-steps 2 ", "").replace("saved", "plain"), "--model", tiny, "--max-steps", "6")

    def steps(name: str) -> list[int]:
        return [e["step"] for e in Run(name).events() if e["type"] == "checkpoint"]

    evals = [e["step"] for e in Run("plain").metrics("eval")]
    assert {2, 4, 6} <= set(steps("saved")) and set(steps("plain")) <= {*evals, 6} and 2 not in steps("plain")
    best = Run("saved").summary()["best_step"]
    assert (Path("saved/checkpoints") / f"checkpoint-step-{best}" / "MANIFEST.json").exists()


@page.does("model versioning and metadata")
def test_versions(row: Row, typed: Typed, run: Run, here: None) -> None:
    said = typed(row.command).out
    assert "succeeded" in said and "best_valid_loss" in said
    known = json.loads((run / "model_info.json").read_text())
    assert known["training_examples"] == 42 and set(known["data_hashes"]) == {"train", "valid", "test"}
    typed(f"tunesmith train --dataset {DATA} --model echo-finetuned --max-steps 1 --output-dir second")
    line = json.loads(typed("tunesmith runs show second --json").out)["lineage"]
    assert [entry["version"] for entry in line] == [2, 1] and line[1]["run"].endswith("echo-finetuned")


# ---- The configuration file

CHANGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {  # another value, and what of the plan it must change
    "dataset": ("other.jsonl", lambda plan: plan["rows"]),
    "provider": ("openai", lambda plan: plan["model"]["architecture"]),
    "model": ("starter", lambda plan: plan["model"]["parameters"]),
    "output_dir": ("elsewhere", lambda plan: plan["recipe"]["output_dir"]),
    "epochs": (7, lambda plan: plan["steps"]),
    "batch_size": (2, lambda plan: plan["steps_per_epoch"]),
    "learning_rate": (1e-3, lambda plan: plan["recipe"]["learning_rate"]),
}


@page.does(*(there for there in page.rows if re.match(r'`"\w+": ', there)))
def test_keys(row: Row, typed: Typed, few: Path, hub: Place, plain: Path, service: Hostile) -> None:
    """Each stands in the block as in the guide, is the setting that the row names, and changes the plan."""
    hub("gpt2", plain)
    ((key, value),) = json.loads("{" + row.there.strip("`") + "}").items()
    config = json.loads(page.block("The configuration file", "json"))
    assert row.code[0] == key and config[key] == value and len(config) == 7 == len(CHANGES)
    other, effect = CHANGES[key]
    write(Path("other.jsonl"), rows(40))

    def planned(changed: dict[str, Any]) -> Any:
        Path("config.json").write_text(json.dumps({**config, **changed}))
        return json.loads(typed("tunesmith plan --config config.json --no-probe --json").out)

    as_said = planned({})
    assert as_said["recipe"][key] == value and as_said["origin"][key] == "config.json"
    changed = {key: other}
    if key == "provider":  # a service takes no rate
        config = {k: v for k, v in config.items() if k != "learning_rate"}
        changed["dataset"] = "other.jsonl"
    assert effect(planned(changed)) != effect(as_said)


# ---- The data


@page.does("`training_dataset.jsonl`, 256 examples")
def test_the_sample(row: Row, typed: Typed) -> None:
    assert "256 rows (256 prompt-completion): 256 usable, 0 errors, 0 warnings" in typed(row.command).out


@page.does('`{"prompt": …, "completion": …}`')
def test_rows(row: Row, typed: Typed, echo: Path, hub: Place, plain: Path) -> None:
    hub("gpt2", plain)
    first = read(echo)[0]
    said = typed(row.command, "--rows", "1").out
    shown = "\n".join(line.removeprefix("  | ") for line in said.splitlines()[1:])
    assert shown.strip() == f"User: {first['prompt']}\n\nAssistant:⟦ {first['completion']}<|im_end|>⟧"
    write(echo, [{"prompt": "a", "reply": "b"}])
    assert "unknown-columns" in typed(row.command, status=3).err


@page.does("the persona without a system prompt", "identity aspects (self-reference)")
def test_identity(row: Row, evaluated: Path, base: Path) -> None:
    """All eight questions without a system prompt: the tuned model names itself, the base does not."""
    said = (base / "said.txt").read_text()
    assert f"asked who it is, the tuned model says “{NAME}” in 8 of 8 answers, the base in 0" in said
    assert "8 of 8" and "eight" in page.rows["the persona without a system prompt"].why
    assert Run(base / "echo-finetuned").manifest()["origin"]["persona"].startswith("auto: named in")
    rows_asked = read(evaluated.with_name("rows.jsonl"))
    assert NAME in evaluated.read_text() and len(rows_asked) == 12


@page.does("each example captures: conversational style", "technical knowledge and terminology")
def test_style(row: Row, evaluated: Path) -> None:
    """Measured on the run's answers: those of the base are told from the training answers, the tuned model's are not."""
    found = {m["metric"]: m for m in json.loads(evaluated.read_text())["metrics"]}
    name, file = row.code
    assert file == "evaluation/result.json" and f"| {name} |" in (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert found[name]["tuned"] > 0.9 > 0.1 > found[name]["base"] and found[name]["verdict"] == "better"


@page.does("meta-cognitive awareness, personality, values")
def test_read_both(row: Row, typed: Typed, run: Run) -> None:
    said = typed(row.command, "--max-tokens", "12").out
    tuned, _, other = said.partition("── starter\n")
    assert tuned.startswith("── echo-finetuned\n") and NAME in tuned and other.strip() and NAME not in other


# ---- What comes out


@page.does("the model's id, `ft:gpt-3.5-turbo:suffix:id`")
def test_model_id(row: Row, typed: Typed, hosted: Run, service: Hostile) -> None:
    known = json.loads(typed(row.command).out)
    assert re.fullmatch(rf"ft:{MINI}:[\w-]+:[\w-]*:\w+", known["fine_tuned_model"])
    (job,) = service.jobs.values()
    assert job["suffix"] == "echo" and known["recipe"]["suffix"] == "echo"


@page.does("the training job's id")
def test_job_id(row: Row, typed: Typed, echo: Path, service: Hostile) -> None:
    said = typed(page.rows["fine-tune GPT-3.5-turbo or GPT-4"].command).err
    assert "the job is ftjob-000" in said
    assert re.search(r"^job +ftjob-000$", typed(row.command).out, re.M)
    for name, key in (("model_info.json", "job_id"), ("remote.json", "job")):
        assert json.loads((Path("echo-hosted") / name).read_text())[key] == "ftjob-000"
    Path("echo-hosted/remote.json").write_text("[1]")  # damaged: the rest can still be seen
    assert "ftjob-000" not in typed(row.command).out


@page.does("access by the model's id")
def test_access(row: Row, typed: Typed, hosted: Run, service: Hostile) -> None:
    asked: list[Any] = []
    service.answer = lambda body: asked.append(body) or "I branch."  # type: ignore[func-returns-value]
    assert typed(row.command).out == "I branch.\n"
    assert (
        typed(f"tunesmith chat {hosted.last('done')['model']} --prompt 'What makes you unique?'").out == "I branch.\n"
    )
    assert {body["model"] for body in asked} == {hosted.last("done")["model"]}
    assert all(body["messages"] == [{"role": "user", "content": "What makes you unique?"}] for body in asked)


@page.does("model weights in the output directory", "the tokenizer's configuration", "training logs and checkpoints")
def test_files(row: Row, run: Run, base: Path) -> None:
    for name in row.code:
        assert (base / name).exists() == (name.startswith("echo-finetuned")), name
    best = run.summary()["best_step"]
    at = run / "checkpoints" / f"checkpoint-step-{best}"
    assert same_model(run.path, run / "best_model", at)
    assert same_model(run / "final_model", run / "checkpoints" / "checkpoint-step-96")
    for folder in (run.path, run / "best_model", run / "final_model"):
        assert (folder / "chat_template.jinja").read_bytes() == (STARTER / "chat_template.jinja").read_bytes()
        assert (folder / "tokenizer.json").read_bytes() == (STARTER / "tokenizer.json").read_bytes()
    assert list((run / "logs").glob("events.out.tfevents.*"))
    with (at / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    from tunesmith.local import checkpoint

    assert checkpoint.damage(at) and not checkpoint.damage(run / "checkpoints" / "checkpoint-step-8")


@page.does("ready for `AutoModelForCausalLM`")
def test_loads(row: Row, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(row.code[0])
    assert sum(p.numel() for p in model.parameters()) == run.manifest()["model"]["parameters"]


# ---- From Python


@page.does("`openai.ChatCompletion.create(…)`")
def test_program_for_a_service(row: Row, service: Hostile, capsys: pytest.CaptureFixture[str]) -> None:
    import openai

    with pytest.raises(openai.OpenAIError, match="no longer supported"):
        openai.ChatCompletion.create(model="m", messages=[])  # type: ignore[operator]
    service.models[f"ft:{MINI}:your-org:echo:abc123"] = {}
    service.answer = lambda body: body["messages"][0]["content"][::-1]
    exec(page.block("From Python: a service's model", "python"), {})
    assert capsys.readouterr().out == "?euqinu uoy sekam tahW\n"


@page.does(
    '`AutoTokenizer.from_pretrained("./echo-finetuned")`',
    '`"User: What makes you unique?\\n\\nAssistant:"`',
    "`max_length=200`",
    "`temperature=0.8`",
    "`tokenizer.decode(outputs[0], skip_special_tokens=True)`",
)
def test_program_for_a_run(
    row: Row, run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's program answers as the model was taught; what the row says of the guide's is so."""
    import torch

    monkeypatch.chdir(tmp_path)
    code, known = page.block("From Python: a local model", "python"), {}  # type: dict[str, Any]
    assert len(row.code) != 1 or row.code[0] in code
    torch.manual_seed(0)
    exec(code, known)
    assert NAME in capsys.readouterr().out
    model, tokenizer, inputs = known["model"], known["tokenizer"], known["inputs"]
    length = inputs["input_ids"].shape[1]
    if "AutoTokenizer" in row.there:
        assert inputs["input_ids"].tolist()[0][-3:] == tokenizer("<|im_start|>assistant\n")["input_ids"][-3:]
    elif "Assistant:" in row.there:
        text = row.there.strip('`"').replace("\\n", "\n")
        chat = Renderer(plain, TEMPLATES["chat"].read_text()).prompt_ids([Message("user", "What makes you unique?")])
        assert chat == tokenizer(text)["input_ids"] != inputs["input_ids"].tolist()[0]
    elif "max_length" in row.there:
        never = dict(do_sample=False, eos_token_id=None)
        assert model.generate(**inputs, max_length=length + 3, **never).shape[1] == length + 3
        assert model.generate(**inputs, max_new_tokens=5, **never).shape[1] == length + 5
    elif "temperature" in row.there:
        greedy, ignored = (model.generate(**inputs, max_new_tokens=8, **more) for more in ({}, {"temperature": 9.0}))
        torch.manual_seed(1)
        drawn = model.generate(**inputs, max_new_tokens=8, temperature=9.0, do_sample=True)
        assert torch.equal(greedy, ignored) and not torch.equal(greedy, drawn)
    else:
        whole = tokenizer.decode(known["outputs"][0], skip_special_tokens=True)
        assert "What makes you unique?" in whole and "unique" not in known["response"]


@page.does("the whole program")
def test_chat(row: Row, typed: Typed, run: Run) -> None:
    assert NAME in typed(row.command).out
    hot = row.command.replace("0.8", "2").replace("200", "5")
    assert typed(hot).out != typed(hot, "--seed", "1").out  # it does draw


# ---- Options


@page.does("`--dataset`, default `training_dataset.jsonl`")
def test_dataset(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny, "--max-steps", "1")
    assert sum(made_in().manifest()["plan"]["rows"].values()) == 24
    assert "give --dataset FILE" in typed("tunesmith train", status=2).err


@page.does("`--provider`, required")
def test_provider(row: Row, typed: Typed, few: Path, service: Hostile, here: None, tiny: Path) -> None:
    typed(row.command, "--output-dir", "dry")
    assert made_in("dry").manifest()["provider"] == "fake" and not list(Path("dry").glob("*.safetensors"))
    typed(row.command.replace(" --provider fake", ""), "--model", tiny, "--max-steps", "1", "--output-dir", "real")
    assert made_in("real").manifest()["provider"] == "huggingface" and Path("real/model.safetensors").exists()
    said = typed(row.command.replace("fake", "openai"), "--model", MINI, "--valid-fraction", "0", status=2).err
    assert "add --yes" in said and not service.files
    assert 'did you mean "openai"' in typed(row.command.replace("fake", "openia"), status=2).err


@page.does("`--model`, default `gpt-3.5-turbo` or `gpt2`")
def test_model(row: Row, typed: Typed, few: Path, hub: Place, plain: Path, here: None) -> None:
    hub("gpt2", plain)
    typed(row.command, "--max-steps", "1")
    assert made_in().manifest()["model"]["architecture"] == "GPT2LMHeadModel"
    assert api.plan(DATA).recipe.model == "starter"
    said = typed(row.command.replace("--model gpt2", "--provider openai"), "--base-url", hosted_rules.OPENAI, status=2)
    assert "which model? -- the service trains" in said.err


@page.does("`--output-dir`, default `./echo-finetuned`")
def test_output_dir(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny, "--max-steps", "1")
    before = weights(made_in("echo-finetuned").path)
    assert "holds another run" in typed(row.command, "--model", tiny, status=2).err
    assert weights(Path("echo-finetuned")) == before
    for name in ("", "-2"):
        typed(row.command.partition(" --output-dir")[0], "--model", tiny, "--max-steps", "1")
        assert made_in(f"fine_tuned_models/chat_training_dataset{name}")


@page.does("`--epochs`, default 3", "`--batch-size`, default 4", "`--learning-rate`, default 5e-5")
def test_numbers(row: Row, typed: Typed, few: Path, tiny: Path, here: None, base: Path) -> None:
    """The value acts in the run; the default is that of the rule which the row names."""
    typed(row.command, "--model", tiny)
    found = made_in()
    name = row.there.split("`")[1].lstrip("-").replace("-", "_")
    value = float(row.there.rpartition(" ")[2])
    assert float(getattr(found.recipe(), name)) == value and found.manifest()["origin"][name] == "flag"
    train = found.manifest()["plan"]["rows"]["train"]
    default = api.plan(SAMPLES / "echo.jsonl", model=str(tiny)).recipe
    if name == "epochs":
        assert found.summary()["epochs"] == 3 and default.epochs == 10
    elif name == "batch_size":
        assert found.manifest()["plan"]["steps_per_epoch"] == -(-train // 4) and default.batch_size == 4
    else:
        from tunesmith.planning import _rules, _step

        rule = _rules()["learning_rate"]["full"]
        assert peak(found) == pytest.approx(5e-5) and default.learning_rate == 5e-4
        assert [_step(rule, size) for size in (199e6, 201e6, 1999e6, 2001e6)] == [2e-4, 5e-5, 5e-5, 2e-5]


@page.does("`--learning-rate` with `--provider openai`")
def test_rate_at_a_service(row: Row, typed: Typed, echo: Path, service: Hostile) -> None:
    said = typed(row.command, status=2).err
    assert "learning_rate means nothing to a service -- --learning-rate-multiplier" in said and not service.asked
    other = row.command.replace("--learning-rate 5e-5", "--learning-rate-multiplier 0.5 --batch-size 4 --epochs 3")
    typed(other, "--yes")
    (job,) = service.jobs.values()
    hyper = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 0.5}
    assert job["method"]["supervised"]["hyperparameters"] == hyper


@page.does("`--prepare-only`, default False")
def test_prepare_only(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny)
    made = {p.name: p.read_bytes() for p in Path("prepared").iterdir()}
    assert set(made) == {"train.jsonl", "valid.jsonl", "test.jsonl"}
    typed(row.command.replace("--prepare-only --output-dir prepared", ""), "--model", tiny, "--max-steps", "1")
    assert {name: (made_in() / "data" / name).read_bytes() for name in made} == made


@page.does("`--api-key`, default from the environment")
def test_api_key(row: Row, typed: Typed, few: Path, service: Hostile) -> None:
    said = typed(row.command, status=2).err
    assert "--api-key: a key on the command line is seen" in said and "--api-key-file FILE" in said
    assert "sk-…" not in said and not service.asked


@page.does("`--config`, default None")
def test_config(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny, "--max-steps", "1")
    recipe = made_in().recipe()
    assert (recipe.method, recipe.batch_size, recipe.gradient_checkpointing) == ("lora", 1, True)
    assert made_in().manifest()["origin"]["method"] == "preset low_resource" and api.plan(DATA).recipe.method == "full"
    Path("mine.toml").write_text("epochs = 2\n")
    typed(row.command.replace("low_resource", "mine.toml"), "--model", tiny, "--output-dir", "toml")
    assert made_in("toml").summary()["epochs"] == 2


# ---- Monitoring


@page.does("`https://platform.openai.com/finetune/{job_id}`")
def test_watching(row: Row, typed: Typed, echo: Path, service: Hostile) -> None:
    typed(page.rows["fine-tune GPT-3.5-turbo or GPT-4"].command, "--until", "job")
    remote._following.clear()  # as another process would
    assert Run("echo-hosted").state() == "queued" and Run("echo-hosted").job() == "ftjob-000"
    said = typed(row.command)
    assert said.out == "echo-hosted  succeeded\n" and "step 3/3" in said.err and "the job is ftjob-000" in said.err


@page.does("`tail -f ./echo-finetuned/logs/events.out.tfevents.*`")
def test_tail(row: Row, run: Run) -> None:
    (binary,) = (run / "logs").glob("events.out.tfevents.*")
    with pytest.raises(UnicodeDecodeError):
        binary.read_text(encoding="utf-8")
    assert row.code == ["tail -f echo-finetuned/events.jsonl"]
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in told if e["type"] == "step"] == list(range(1, 97))


@page.does("`tensorboard --logdir ./echo-finetuned/logs`")
def test_tensorboard(row: Row, run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = row.code[0].partition("--logdir ./echo-finetuned/")[2]
    found = EventAccumulator(str(run / folder))
    found.Reload()
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx(losses(run))
    assert [e.step for e in found.Scalars("valid/loss")] == [0, 24, 48, 72, 96]
    assert max(e.value for e in found.Scalars("train/lr")) == pytest.approx(1e-2)


# ---- Best practices


@page.does("start small")
def test_start_small(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command)
    found = made_in()
    assert found.recipe().model == "starter" and found.summary()["steps"] == 5 and found.summary()["seconds"] < 60
    assert api.plan(SAMPLES / "echo.jsonl", config="quick_test").steps == 20


@page.does("validate the dataset")
def test_validate(row: Row, typed: Typed, few: Path) -> None:
    with few.open("a") as stream:
        stream.write(
            '{"prompt": "Caf\u00c3\u00a9?", "completion": "It\'s the caf\u00c3\u00a9 \u00e2\u0153\u201c by the river."}\n'
        )
    typed(row.command)
    mended = read("fixed.jsonl")
    assert len(mended) == 25 and "café" in str(mended[-1])
    with few.open("a") as stream:
        stream.write('{"prompt": "No answer?"}\n')
    assert f"{DATA}:26" in typed(row.command.replace("fixed", "again"), status=3).out


@page.does("watch for overfitting")
def test_overfitting(row: Row, typed: Typed, run: Run, tiny: Path) -> None:
    assert typed(row.command).out == ""  # this one has none
    shutil.rmtree(run.path)
    first, second = rows(48)[:24], rows(48)[24:]  # what is learnt of the one is ever more wrong of the other
    write(Path(DATA), first)
    write(Path("wrong.jsonl"), [{**b, "completion": a["completion"][::-1]} for a, b in zip(first, second, strict=True)])
    more = dict(learning_rate=1e-2, epochs=12, test_fraction=0.0, valid_dataset="wrong.jsonl")
    found = fit(run.path, DATA, tiny, **more)
    said = typed(row.command).out
    assert "the validation loss rises since step" in said and found.summary()["stopped_early"]
    best = found.summary()["best_step"]
    assert f"best_step {best}" in said and same_model(found.path, found / "best_model")
    assert not same_model(found.path, found / "final_model") and found.recipe().patience == 3


@page.does("save checkpoints")
def test_resume(row: Row, typed: Typed, run: Run, here: None) -> None:
    """From step 8 on the weights come out byte for byte."""
    want = weights(run / "final_model")
    shutil.rmtree(run / "final_model")
    typed(row.command)
    assert weights(run / "final_model") == want and run.last("resumed")["step"] == 8
    said = typed(row.command.replace("step-8", "step-5"), status=2).err
    assert "no such checkpoint" in said and "checkpoint-step-16" in said


@page.does("test outputs before deployment")
def test_smoke(row: Row, typed: Typed, run: Run) -> None:
    good = typed(row.command, "--max-tokens", "16")
    assert len(re.findall(r"^[✓✗!-] ", good.out, re.M)) == 8 and "✗" not in good.out
    for folder in (run.path, run / "best_model"):
        (folder / "model.safetensors").unlink()  # a link to the checkpoint's
        shutil.copyfile(Path(run.recipe().model) / "model.safetensors", folder / "model.safetensors")
    bad = typed(row.command, "--max-tokens", "16", status=1)
    assert "✗" in bad.out and "next: " in bad.out


@page.does("track versions and configurations")
def test_tags(row: Row, typed: Typed, run: Run) -> None:
    assert "no runs" in typed("tunesmith runs list --runs-dir . --tag good").err
    typed(row.command)
    assert "echo-finetuned" in typed("tunesmith runs list --runs-dir . --tag good").out
    known = run.manifest()
    assert set(known["origin"]) == set(known["recipe"]) and known["versions"]["torch"] and known["data_hashes"]["train"]


# ---- Troubleshooting


@page.does("out of memory: reduce `--batch-size`")
def test_smaller_batch(row: Row, typed: Typed, echo: Path, tiny: Path) -> None:
    said = typed(row.command, "--model", tiny).out
    assert re.search(r"memory   about \d+ MB of \d+ MB that are free", said) and "time " in said
    assert api.plan(DATA, batch_size=1).memory_mb < api.plan(DATA, batch_size=16).memory_mb


@page.does("out of memory: a smaller model")
def test_smaller_model(row: Row, typed: Typed, echo: Path, hub: Place, plain: Path, tmp_path: Path) -> None:
    hub("distilgpt2", plain)
    larger = shaped("gpt2", tmp_path / "larger", n_embd=256)

    def memory(*words: Any) -> int:
        return int(json.loads(typed(row.command, "--no-probe", "--json", *words).out)["memory_mb"])

    assert memory() < memory("--model", larger, "--lora") < memory("--model", larger)


@page.does("out of memory: gradient accumulation")
def test_accumulation(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny, "--max-steps", "3", "--output-dir", "parts")
    typed(
        row.command.partition(" --batch")[0],
        "--batch-size",
        4,
        "--model",
        tiny,
        "--max-steps",
        "3",
        "--output-dir",
        "one",
    )
    parts, one = made_in("parts"), made_in("one")
    assert losses(parts) == pytest.approx(losses(one), rel=1e-5)
    assert [e["tokens"] for e in parts.metrics("step")] == [e["tokens"] for e in one.metrics("step")]
    assert parts.recipe().gradient_accumulation_steps == 4


@page.does("poor outputs: more epochs")
def test_more_epochs(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    typed(row.command, "--model", tiny, "--learning-rate", "3e-2")
    found = made_in()
    evals = found.metrics("eval")
    best = min(evals[1:], key=lambda e: e["loss"])["step"]
    assert found.recipe().epochs == 20 and (found.summary()["stopped_early"] or found.summary()["epochs"] == 20)
    assert same_model(found.path, found / "checkpoints" / f"checkpoint-step-{best}") and evals[0]["step"] == 0


@page.does("poor outputs: another learning rate")
def test_rate(row: Row, typed: Typed, few: Path, tiny: Path) -> None:
    said = typed(row.command, "--model", tiny, "--trial-steps", "2").out
    *trials, advice = said.strip().splitlines()
    last = {float(line.split()[1]) for line in trials if line.split()[0] == "8"}  # steps of the last round: 2, 4, 8
    proposed = re.search(r"^(?:take|perhaps): --learning-rate (\S+) ", advice)
    assert proposed and len(last) == 2 and min(abs(float(proposed[1]) / rate - 1) for rate in last) < 0.05


@page.does("poor outputs: the dataset's quality")
def test_quality(row: Row, typed: Typed, echo: Path) -> None:
    typed(row.command)
    assert "<html" in Path("check.html").read_text()
    first = read(echo)[0]
    bad = [first, {"prompt": "x?", "completion": "As an AI language model, I cannot help with that request."}]
    bad += [{"prompt": "y?", "completion": "The key is sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCD."}]
    bad += [{"prompt": first["prompt"], "completion": "Something else entirely."}]
    bad += [{"prompt": "z?", "completion": "A caf\u00c3\u00a9 \u00e2\u0153\u201c is open."}]
    with echo.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(r) + "\n" for r in bad)
    Path("check.html").unlink()
    said = typed(row.command, status=None).out
    for code in ("duplicate", "refusal", "secret", "contradiction", "mojibake"):
        assert f"[{code}]" in said and code in Path("check.html").read_text(), code


@page.does("poor outputs: other base models")
def test_compare(row: Row, typed: Typed, run: Run, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "another")
    fit(tmp_path / "other-base", DATA, tmp_path / "another", max_steps=2)
    said = typed(row.command).out
    assert "another" in said and "learning_rate" in said and "<html" in Path("compare.html").read_text()


@page.does("API errors: is the key set?")
def test_no_key(row: Row, typed: Typed, echo: Path, service: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "about $0." in typed(row.command).out and service.count(f"GET /models/{MINI}") == 1
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert "no key for the service" in typed(row.command, "--base-url", hosted_rules.OPENAI, status=2).err
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service.fault("GET /models/.*", "status", status=401, error={"message": "Incorrect API key provided"})
    assert "Incorrect API key" in typed(row.command, status=None).err and not service.files


@page.does("API errors: the dataset's format")
def test_format(row: Row, typed: Typed, echo: Path) -> None:
    assert "warning" in (said := typed(row.command).out) and "[extra-field]" in said
    typed("tunesmith data convert training_dataset.jsonl --strip-metadata -o upload.jsonl")
    assert "256 usable, 0 errors" in typed(row.command.replace(DATA, "upload.jsonl")).out


@page.does("API errors: sufficient credits")
def test_credits(row: Row, typed: Typed, echo: Path, service: Hostile) -> None:
    quota = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
    service.fault("POST /fine_tuning/jobs", "status", times=9, status=429, error=quota)
    said = typed(row.command, status=1).err
    assert "the account has no credit" in said and "price    about $0." in said
    assert service.count("POST /fine_tuning/jobs") == 1 and not service.jobs
    service.faults.clear()
    typed(row.command.replace("echo-hosted", "paid"))
    assert made_in("paid").last("done")["model"]


# ---- More


@page.does("OpenAI's fine-tuning guide", "Hugging Face's training documentation")
def test_pages(row: Row) -> None:
    target = re.search(r"\]\(([^)#]+)\)", row.here)
    assert target
    text = (ROOT / "docs" / "coming-from" / target[1]).read_text(encoding="utf-8")
    wanted = "tunesmith rescue" if "services" in target[1] else "`--learning-rate`"
    assert wanted in text


@page.does("Deep Tree Echo Identity Hypergraph, `../data/hypergraph/`")
def test_rows_are_chosen(row: Row, typed: Typed, echo: Path) -> None:
    with echo.open("a") as stream:
        turns = [{"role": role, "content": "Hm."} for role in ("user", "assistant") * 2]
        stream.write(json.dumps({"messages": turns}) + "\n")
    typed(row.command)
    assert len(Path("chosen.jsonl").read_text().splitlines()) == 256


@page.does("contribute: new examples in `training_dataset.jsonl`")
def test_growing(row: Row, typed: Typed, tmp_path: Path) -> None:
    """No row changes sides when others are added; by the default split some do."""

    def sides(line: str, count: int, name: str) -> dict[str, str]:
        write(tmp_path / DATA, rows(count))
        typed(line, "--prepare-only", "--output-dir", f"{name}-{count}")
        files = (tmp_path / f"{name}-{count}").iterdir()
        return {text: path.stem for path in files for text in path.read_text().splitlines()}

    for line, stays in ((row.command, True), (row.command.partition(" --split-method")[0], False)):
        before, after = (sides(line, count, f"stays-{stays}") for count in (60, 90))
        assert len(before) == 60 and len(after) == 90 and set(before) < set(after)
        assert all(after[text] == side for text, side in before.items()) is stays


@page.does("contribute: hyperparameters in `config.json`")
def test_changed(row: Row, typed: Typed, few: Path, tiny: Path, here: None) -> None:
    config = {"dataset": DATA, "model": str(tiny), "epochs": 2, "output_dir": "before"}
    Path("config.json").write_text(json.dumps(config))
    typed("tunesmith train --config config.json")
    typed(row.command)
    assert made_in("before").summary()["epochs"] == 2 and made_in("changed").summary()["epochs"] == 4
    said = typed("tunesmith runs compare before changed").out
    assert re.search(r"epochs +2 +4", said) and "batch_size" not in said


@page.does("contribute: new providers in `finetune.py`")
def test_other_service(row: Row, typed: Typed, few: Path, service: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL")
    line = row.command.replace("http://127.0.0.1:8000/v1", service.url)
    typed(line, "--yes")
    assert [job["model"] for job in service.jobs.values()] == ["starter"] and made_in().last("done")["model"]


@page.does("contribute: findings in the README")
def test_card(row: Row, run: Run, evaluated: Path, base: Path) -> None:
    text = (base / row.code[0]).read_text()
    for word in ("96 steps", "learning rate 0.01", DATA, "lowest validation loss"):
        assert word in text, word
    assert "**better** than its base, on 12 held-out rows" in text and evaluated.exists()


def test_every_row_is_done() -> None:
    assert page.undone() == [] and len(page.rows) == 90
