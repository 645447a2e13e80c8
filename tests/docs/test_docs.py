"""Documentation that is executed or compared with the source: it cannot go stale unseen."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

from conftest import ROOT, rows, write
from tunesmith import cli
from tunesmith.conversation import Conversation, Message
from tunesmith.data.findings import table
from tunesmith.recipe import fields

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


SHELL = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def commands() -> list[str]:
    """The `tunesmith …` lines of the README's shell blocks."""
    return [line.split("  #")[0].strip() for line in SHELL if line.startswith("tunesmith ")]


def test_the_readme_has_what_these_tests_look_for() -> None:
    assert len(commands()) >= 30
    assert [kind for kind, _ in BLOCKS].count("python") >= 1
    others = [line.split()[0] for line in SHELL if not line.startswith("tunesmith ")]
    assert others == ["make", "make", "export", "cp"]  # each is what another test does


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's data file and a short run under the README's name."""
    folder = tmp_path_factory.mktemp("readme")
    sample = (ROOT / "src/tunesmith/assets/data/chat.jsonl").read_bytes()
    (folder / "data.jsonl").write_bytes(sample)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tunesmith",
            "train",
            "--dataset",
            "data.jsonl",
            "--output-dir",
            "my_run",
            "--max-steps",
            "2",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def started_and_stopped(words: list[str], folder: Path) -> bool:
    """Whether a `serve` answers where it says it listens, on any free port, and a Ctrl-C ends it in good order."""
    command = [sys.executable, "-m", "tunesmith", *words, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        assert served.stdout
        url = served.stdout.readline().strip()
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health") as answer:
            well = answer.status == 200
        served.send_signal(signal.SIGINT)
        _, said = served.communicate(timeout=60)
    assert served.returncode == 0, said
    return well and url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("line", commands())
def test_readme_command(line: str, trained: Path) -> None:
    """Each command runs as written; training is cut short, quickstart has a test of its own."""
    words = shlex.split(line)[1:]
    if words[0] == "serve":
        assert started_and_stopped(words, trained)
        return
    if words[0] == "quickstart":  # it has tests of its own
        words = [words[0], "--help"]
    elif words[0] == "lr-find":
        words += ["--trial-steps", "1"]
    elif words[0] == "evaluate":
        words += ["--rows", "4", "--samples", "0", "--weighed", "8", "--max-tokens", "16"]
    elif "--drop-codes" in words:
        assert cli.main(["evaluate", str(trained / "my_run"), "--rows", "0", "--weighed", "40"]) == 0
    elif "lora_run" in words and words[0] == "runs":
        shutil.copytree(trained / "my_run", trained / "lora_run", dirs_exist_ok=True)
    elif words[0] == "export":
        shutil.rmtree(trained / words[-1], ignore_errors=True)
        words += ["--prompts", "1"]
    elif words[0] == "push" and not (trained / words[1]).exists():
        made = ["export", str(trained / "my_run"), "-o", str(trained / words[1]), "--prompts", "1"]
        assert cli.main(made) == 0
    elif words[0] == "train" and "--resume" not in words:
        words += ["--max-steps", "2"]
        words = [f"another_{word}" if word in ("my_run", "lora_run") else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *words], cwd=trained, capture_output=True, text=True, input="Hi\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_readme_python(block: str, trained: Path) -> None:
    code = block.replace("epochs=3", "max_steps=2")
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_all_that_a_run_leaves(trained: Path) -> None:
    assert README.count("```") == 2 * len(BLOCKS)  # no block without a kind
    (tree,) = (text for kind, text in BLOCKS if kind == "text")
    assert tree.startswith("my_run/\n")
    listed = {word.rstrip("/") for word in re.findall(r"^  (\S+)", tree, re.M)} | set(tree.splitlines()[-1].split())
    found = {path.name for path in (trained / "my_run").iterdir() if not path.name.startswith(".")}
    of_models = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    of_models |= {"tokenizer.json", "tokenizer_config.json"}  # "the run's own folder loads as this one"
    assert listed == (found - of_models) | {"evaluation", "report.html"} and of_models <= found


def test_each_row_of_the_readme_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (text for kind, text in BLOCKS if kind == "json")
    assert len(block.splitlines()) == 4
    for number, line in enumerate(block.splitlines()):
        (tmp_path / f"{number}.jsonl").write_text(line + "\n", encoding="utf-8")
        assert cli.main(["data", "check", str(tmp_path / f"{number}.jsonl"), "--structure-only"]) == 0, line
        assert "1 usable, 0 errors" in capsys.readouterr().out


def test_every_finding_code_is_documented_and_used() -> None:
    source = "".join(p.read_text() for p in (ROOT / "src/tunesmith").rglob("*.py"))
    documented = re.findall(r"^\| `([a-z0-9-]+)`", (ROOT / "docs/data-findings.md").read_text(), re.M)
    severity = ("error", "warning", "info")
    assert documented == sorted(table(), key=lambda code: (severity.index(table()[code]["severity"]), code))
    assert len(documented) >= 40
    assert not [code for code in documented if f'"{code}"' not in source]
    named = set(re.findall(r'(?:finding\(\s*|Bad\(\s*)"([a-z0-9-]+)"', source))
    assert len(named) >= 28 and named <= set(documented)


def test_what_a_report_prints_beside_its_metrics_is_defined() -> None:
    source = (ROOT / "src/tunesmith/evaluation/evaluate.py").read_text(encoding="utf-8")
    names = re.findall(r'"(loss on [^"]+)"', source)
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert len(names) == 2 and all(f"| {name} |" in text for name in [*names, "identity probes"])


def test_the_python_reference_keeps_quotes_and_hides_internals() -> None:
    text = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
    assert "form: str = 'merged'" in text and "source: str = ''" in text and "= ," not in text
    assert "`.summary(" in text and "`.append(" not in text and "`.lock(" not in text
    assert "\n## Evaluation\n" in text and len(re.findall(r"^- `[a-z_]+: [^`]+`: .", text, re.M)) >= 150
    assert "see `tunesmith" not in text and "Options: those of" not in text


def test_settings_reference_is_current() -> None:
    """docs/settings.md, docs/metrics.md and the help pages are made from the code: `python tools/pages.py`."""
    done = subprocess.run([sys.executable, ROOT / "tools/pages.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/settings.md").read_text()
    assert all(f"`--{name.replace('_', '-')}`" in page for name in fields())
    assert "| SFTConfig `max_length`, SFTConfig `max_seq_length` |" in page
    assert "| SFTConfig `chat_template_path` |" in page


def test_every_number_has_a_unit() -> None:
    numbers = [f for f in fields().values() if "int" in str(f.type) or "float" in str(f.type)]
    assert len(numbers) >= 30 and all(f.unit and f.number() for f in numbers)
    assert not [f.name for f in fields().values() if f not in numbers and (f.unit or f.number())]


def test_messages_that_helpers_make_are_among_the_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is said by a command, and stands in docs/errors.md, where braces stand for what is filled in."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", rows(12))
    (tmp_path / "my_run").mkdir()
    (tmp_path / "my_run" / "run.json").write_text("{}")
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    messages = [line.split(" | ")[1] for line in page.splitlines() if re.match(r"\| \w+(Error|ed) \|", line)]
    assert len(messages) > 300 and not [text for text in messages if re.fullmatch(r"(\{[^}]*\})+", text)]
    known = [re.compile(re.sub(r"\\\{.*?\\\}", ".+", re.escape(text))) for text in messages]
    for line, said in (
        ("train --colour red", "unknown option --colour"),
        ("train --dataset data.jsonl --optim sgd", "expected one of adamw"),
        ("data stats data.jsonl --model gpt-3.5-turbo-0001", "is not among the hosted models"),
        ("train --dataset data.jsonl --output-dir my_run", "holds another run"),
        ("data preview data.jsonl --colour red", "unknown option --colour"),
    ):
        assert cli.main(line.split()) == 2
        error = capsys.readouterr().err
        message = error.split(" -- ")[0].partition(": ")[2]
        assert said in message and any(said.split()[0] in one.pattern and one.search(message) for one in known)
    (tmp_path / "file").write_text("")
    for line, said in (
        ("data split data.jsonl -o file/part", "File exists"),
        ("train --epochs", "needs a value"),
    ):
        assert cli.main(line.split()) > 0 and said in capsys.readouterr().err and said in page


def appended() -> dict[str, set[str]]:
    """Types of events that the source adds to a run, with the names of their fields."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src/tunesmith").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and (node.keywords or ast.unparse(node.func.value).endswith("run")):
                    found.setdefault(str(first.value), set()).update(k.arg for k in node.keywords if k.arg)
    return found


def test_every_event_is_documented(tiny: Path, tmp_path: Path) -> None:
    """Those that the source adds and those of a run, with their fields; and no others."""
    from training import fit

    known = tomllib.loads((ROOT / "src/tunesmith/facts/events.toml").read_text(encoding="utf-8"))
    used = appended()
    assert set(used) - {"resume"} == set(known) and len(known) >= 15
    assert not {kind: more for kind, names in used.items() if (more := names - {*known[kind]["fields"], "time"})}
    run = fit(tmp_path / "run", write(tmp_path / "rows.jsonl", rows(40)), tiny, epochs=1, freeze_ratio=0.5)
    seen = {event["type"] for event in run.events()}
    assert {"state", "step", "eval", "checkpoint", "done"} <= seen
    for event in run.events():
        assert set(event) <= {*known[event["type"]]["fields"], "type", "time"}, event


def test_every_metric_is_defined_in_whole_sentences() -> None:
    """The report says "{about} Range: {span}. Source: {source}."; names are told apart over all tasks."""
    from tunesmith.evaluation import likelihood, tasks

    every = {m for found in tasks.TASKS.values() for m in found} | {*likelihood.METRICS, likelihood.PER_BYTE}
    assert len({m.name for m in every}) == len(every) >= 30
    assert not [m.name for m in every if not re.fullmatch(r"[A-Z\d].*[^.]\.", m.about) or "  " in m.about]
    assert not [m.name for m in every if m.span[0].islower() or m.span.strip().rstrip(".") != m.span]
    assert not [m.name for m in every if not m.source or m.source.strip().rstrip(".") != m.source]
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert all(page.count(f"\n| {m.name} | ") == 1 for m in every)


def test_every_diagnosis_is_documented() -> None:
    """Those that the rules make, those of the table, those of the guide: the same names."""
    from tunesmith.evaluation.diagnosis import PITFALLS

    source = (ROOT / "src/tunesmith/evaluation/diagnosis.py").read_text(encoding="utf-8")
    assert set(re.findall(r'Diagnosis\(\s*"([a-z ]+)"', source)) == set(PITFALLS) and len(PITFALLS) >= 13
    guide = (ROOT / "docs/guides/evaluating.md").read_text(encoding="utf-8")
    part = guide.partition("## Diagnoses")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([a-z ]+) \|", part, re.M)[1:] == list(PITFALLS)


def test_the_guide_to_evaluating(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands run as written but for fewer and shorter answers, its metric measures, its program finds the same figures."""
    from hostile import KEY, Hostile
    from training import fit
    from tunesmith.evaluation import code, tasks
    from tunesmith.evaluation.rowreport import CODES

    guide = (ROOT / "docs/guides/evaluating.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", guide, re.S)
    assert [kind for kind, _ in blocks if kind != "sh"] == ["python", "json", "python"]
    lines = [line.split("  #")[0].strip() for kind, text in blocks if kind == "sh" for line in text.splitlines()]
    assert len(lines) == 15 and all(line.startswith("tunesmith ") for line in lines)
    metric, row, program = (text for kind, text in blocks if kind != "sh")

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_bytes((ROOT / "src/tunesmith/assets/data/chat.jsonl").read_bytes())
    for name, rate in (("my_run", 1e-2), ("other_run", 1e-3)):
        fit(tmp_path / name, data, tiny, test_fraction=0.25, learning_rate=rate, epochs=2)
    write(tmp_path / "held_out.jsonl", rows(9))
    (tmp_path / "metrics.py").write_text(metric)
    service = Hostile()
    service.models, service.answer = {"judge": {}}, lambda body: '{"verdict": "A"}'
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = {}
    for line in lines:
        words = shlex.split(line.replace("http://127.0.0.1:8000/v1", service.url))[1:]
        if words[0] == "evaluate":
            rows_asked = ["--rows", "12"] if "metrics.py:hours" in words or "--judge" in words else ["--rows", "2"]
            words += [*rows_asked, "--samples", "0", "--weighed", "16", "--max-tokens", "8"]
        assert cli.main(words) == 0, (line, capsys.readouterr().err)
        said[line] = capsys.readouterr().out
    service.close()

    own, judged = (
        next(out for line, out in said.items() if word in line) for word in ("metrics.py:hours", "--judge-model")
    )
    assert re.search(r"^verdict: .*, by hours$", own, re.M)
    assert "the judge judge: 0 won" in judged and "it followed the position in 100%" in judged
    assert "cannot be paired" not in said[next(line for line in lines if "compare" in line)]
    assert all((tmp_path / name).exists() for name in ("clean.jsonl", "compare.html", "my_run/evaluation/judge.jsonl"))
    message = Message("user", "?"), Message("assistant", json.loads(row)["completion"])
    assert code.test_of(Conversation(message, metadata={"test": json.loads(row)["test"], "language": "python"}))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[0] in ("better", "worse", "cannot"), done.stderr

    kept = re.findall(r"`(\w+\.jsonl?)`", guide.partition("## Recomputing")[2].partition("```python")[0])
    made = {path.name for path in (tmp_path / "my_run/evaluation").iterdir() if path.is_file()}
    assert made <= set(kept) and set(kept) - made <= {"recited.jsonl", "taught.jsonl"}  # no row was learnt by heart
    table_of_tasks = guide.partition("## Which metrics")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\w+) \|", table_of_tasks, re.M)[1:] == ["every", *tasks.TASKS]
    assert all(f"**{code.replace('_', ' ')}**" in guide for code in CODES)


def test_the_guide_to_deploying(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our commands run as written; those of other programs are the ones that our own name; the tables are those of the facts."""
    from training import fit
    from tunesmith.exporting import forms, parity

    guide = (ROOT / "docs/guides/deploying.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", guide, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    ours = [line for line in lines if line.startswith("tunesmith ")]
    assert (len(lines), len(ours)) == (13, 10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("When are you open?\nWhat does it cost?\n")
    sample = ROOT / "src/tunesmith/assets/data/chat.jsonl"
    fit(tmp_path / "my_run", sample, tiny, max_steps=4)
    said = ""
    for line in ours:
        words = shlex.split(line)[1:] + (["--prompts", "2"] if "export " in line or "parity " in line else [])
        status = cli.main(words)
        assert status == 0 or words[0] == "test", (line, capsys.readouterr())  # so small a model never stops
        said += capsys.readouterr().out
    for line in set(lines) - set(ours):
        assert line.replace("exported", str(tmp_path / "exported")) in said, line
    limits = parity.facts()["limits"]
    for name in forms.facts()["quantisations"]:
        row = next(r for r in guide.splitlines() if re.match(rf"\| ([\w, ]*, )?{name}(, [\w, ]*)? \|", r))
        assert f"| {limits[name]['drift']} |" in row and f"| {limits[name]['same']:.0%} |".replace("%", " %") in row, (
            name
        )
    shapes = guide.partition("GGUF is written for ")[2].partition(", by what")[0].lower().replace("-", "")
    assert all(re.sub(r"\d$", "", name) in shapes for name in forms.facts()["models"])


def test_tree_is_free_of_machine_paths() -> None:
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.split()
    if not tracked:
        tracked = [str(p.relative_to(ROOT)) for p in (ROOT / "src").rglob("*.py")]
    texts = [p for p in map(ROOT.joinpath, tracked) if p.suffix in (".py", ".md", ".toml", ".jinja", ".json")]
    assert len(texts) > 60
    assert not [str(p) for p in texts if re.search(r"(?<![\w.])/(root|home/\w+)/", p.read_text(encoding="utf-8"))]


def test_the_guide_to_serving(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options exist, its commands run one after another, and its program runs against a server."""
    from serving import Server, chats

    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs/guides/serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", guide, re.S)
    lines = [line.split("  #")[0] for kind, text in blocks if kind == "sh" for line in text.splitlines()]
    assert len(lines) == 7 and [kind for kind, _ in blocks].count("python") == 1
    known = (ROOT / "src/tunesmith/assets/help/serve.txt").read_text()
    for option in set(re.findall(r"--[a-z][a-z-]+", guide)) - {"--admin"}:
        assert option in known, option
    for name in ("Qwen2.5-0.5B", "Llama-3.2-1B"):
        (tmp_path / name).symlink_to(tiny)
    for line in lines:
        words = shlex.split(line.replace("0.0.0.0", "127.0.0.1"))[1:]
        assert started_and_stopped(words, tmp_path) if words[0] == "serve" else cli.main(words) == 0, line
    (tmp_path / "train.jsonl").write_bytes(chats(12))
    server = Server(tmp_path / "data")
    try:
        code = next(text for kind, text in blocks if kind == "python").replace("http://127.0.0.1:8000/v1", server.url)
        code = code.replace('suffix="my-bot"', 'suffix="my-bot", hyperparameters={"n_epochs": 1}')
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        server.stop()


def test_the_guide_to_several_machines() -> None:
    """Shell scripts parse, the manifest is YAML that Kubernetes' shapes fit, and every `tunesmith train` takes its options."""
    import yaml

    from tunesmith.cli.options import Parser, add_settings, settings
    from tunesmith.settings import resolve

    text = (ROOT / "docs" / "guides" / "several-gpus.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.S)
    assert [kind for kind, _ in blocks] == ["bash"] * 5 + ["yaml"]
    service, job = yaml.safe_load_all(blocks[-1][1])
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    container = job["spec"]["template"]["spec"]["containers"][0]
    volumes = {v["name"] for v in job["spec"]["template"]["spec"]["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == volumes
    assert container["command"] == ["bash", "-c"]
    lines = []
    for script in (*(block for kind, block in blocks if kind == "bash"), *container["args"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
        joined = script.replace("\\\n", " ").splitlines()
        lines += [(shlex.split(line.strip()), script) for line in joined if "tunesmith train " in line]
    assert len(lines) == 7
    for words, script in lines:
        given = words[words.index("train") + 1 :]
        if given == ["${what[@]}"]:  # which stand in a line above
            line = next(row for row in script.splitlines() if "--dataset" in row)
            given = shlex.split(line.partition("(")[2].rstrip(")").replace("$run", "run"))
        parser = Parser("train", "")
        add_settings(parser)
        recipe, _ = resolve(settings(parser.parse_args(given)))
        assert recipe.dataset and recipe.model


def test_the_guide_to_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands run as written, against a service that is set up here."""
    from hostile import KEY, Hostile

    guide = (ROOT / "docs/guides/services.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", guide, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    assert [line for line in lines if not line.startswith("tunesmith ")] == ["export OPENAI_API_KEY=…"]  # done below
    lines = [line for line in lines if line.startswith("tunesmith ")]
    assert len(lines) >= 9
    (tmp_path / "data.jsonl").write_bytes((ROOT / "src/tunesmith/assets/data/chat.jsonl").read_bytes())
    service = Hostile()
    service.models = {"gpt-4.1-mini-2025-04-14": {"shutdown_date": "2999-01-14"}}
    monkeypatch.setenv("OPENAI_BASE_URL", service.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = {}
    for line in lines:
        command = [sys.executable, "-m", "tunesmith", *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        said[" ".join(shlex.split(line)[1:3])] = done.stdout
    service.close()
    assert "ends gpt-4.1-mini-2025-04-14, and what is tuned from it, on 2999-01-14" in said["plan --dataset"]
    assert "about $0.0" in said["plan --dataset"] and "auto: the variable OPENAI_BASE_URL" in said["plan --dataset"]
    assert "verdict: cannot tell" in said["evaluate hosted"] and "An answer." in said["chat hosted"]
    assert (tmp_path / "hosted/report.html").exists() and (tmp_path / "rescued/ftjob-000/run.json").exists()
    assert "1 jobs: 1 succeeded" in said["rescue --output-dir"]


def test_the_page_of_the_examples(tmp_path: Path) -> None:
    """Its folders are there with what it says is in them, and its lines give the program words that it takes."""
    from tunesmith.cli.options import Parser, add_settings, settings
    from tunesmith.settings import resolve

    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    folders = re.findall(r"^\| \[(\w+)\]\((\w+)\) \|", page, re.M)
    assert [name for name, _ in folders] == ["echo", "refocused", "emoji"] and all(a == b for a, b in folders)
    for name, _ in folders:
        made = {path.name for path in (ROOT / "examples" / name).iterdir()}
        assert {"run.sh", "expected.txt", "custom.toml" if name == "refocused" else "recipe.toml"} <= made
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("run", "runs"))
    program = tmp_path / "tunesmith"
    program.write_text(
        f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >> {tmp_path}/said\necho >> {tmp_path}/said\n'
    )
    program.chmod(0o755)
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.S)
    lines = [line.split("  #")[0].strip() for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        (tmp_path / "said").unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        assert subprocess.run(line, shell=True, cwd=tmp_path, env=env).returncode == 0
        train, evaluate, *_ = (call.split("\n") for call in (tmp_path / "said").read_text().split("\n\n"))
        parser = Parser("train", "")
        add_settings(parser)
        recipe, _ = resolve(settings(parser.parse_args(train[3:])))
        assert train[:3] == ["train", "--config", "recipe.toml"] and evaluate[:2] == ["evaluate", "run"]
        assert (recipe.max_steps == 2) == ("--max-steps 2" in line) and ("4" in evaluate) == ("ROWS=4" in line)


@pytest.mark.parametrize("name", ["echo", "refocused", "emoji"])
def test_an_example_ends_at_the_first_failure(name: str, tmp_path: Path) -> None:
    """`sh run.sh` reads no options from the first line: a train that fails is the last command all the same."""
    source = ROOT / "examples" / name / "run.sh"
    (tmp_path / "run.sh").write_bytes(source.read_bytes())
    (tmp_path / "tunesmith").write_text('#!/bin/sh\necho "$1" >> said\nexit 3\n')
    (tmp_path / "tunesmith").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["sh", tmp_path / "run.sh"], env=env).returncode == 3
    assert (tmp_path / "said").read_text() == "train\n"


@pytest.mark.parametrize("name", ["echo", "refocused", "emoji"])
def test_an_example(name: str, tmp_path: Path) -> None:
    """In small form: it runs from anywhere, and prints what its expected.txt has, figures and answers apart."""
    source = ROOT / "examples" / name
    left = shutil.ignore_patterns("run", "runs")  # by whoever has tried it here
    shutil.copytree(source, tmp_path / name, ignore=left)
    program = tmp_path / "bin" / "tunesmith"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tunesmith "$@"\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "ROWS": "4"}
    short_run = ["sh", tmp_path / name / "run.sh", "--max-steps", "2", "--threads", "1"]
    done = subprocess.run(short_run, env=env, capture_output=True, text=True)
    assert done.returncode == (name == "emoji"), done.stderr[
        -2000:
    ]  # its `tunesmith test` fails: two steps teach nothing
    expected = (source / "expected.txt").read_text(encoding="utf-8")
    for start in ("  metric  ", "  loss (nats per token)", "verdict: ", "report:  run"):
        count = len([line for line in expected.splitlines() if line.startswith(start)])
        assert count >= (5 if name == "refocused" else 1)
        assert len([line for line in done.stdout.splitlines() if line.startswith(start)]) == count, start
