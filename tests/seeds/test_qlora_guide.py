"""docs/coming-from/qlora-guide.md: what it says is done, row by row."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
import shlex
import shutil
import struct
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import cache as once
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from conftest import ROOT, STARTER, rows, write
from hostile import KEY, Hostile
from pages import Page, Row
from shapes import shaped
from training import fit, losses, weights
from tunesmith import api
from tunesmith.data.convert import emoji_in
from tunesmith.evaluation import compression, rowreport
from tunesmith.local import backend, methods
from tunesmith.local import model as models
from tunesmith.local.loop import train
from tunesmith.recipe import Recipe, canonical, fields
from tunesmith.runs import Run

page = Page("qlora-guide.md")
SAMPLE = ROOT / "src/tunesmith/assets/data/emoji.jsonl"
SPAM = "Yes, all of that is so very good and fine 🎉🎊😀😁😂😃"
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"
Typed = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft's; a worker shows no warnings


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that the page speaks of, `my_run` and `other_run` evaluated."""
    folder = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        how: dict[str, Any] = {"num_workers": 1, "epochs": 3, "eval_steps": 10, "test_fraction": 0.3, "method": "qlora"}
        for name, rate in (("my_run", 1e-2), ("other_run", 1e-3)):
            fit(folder / name, SAMPLE, tiny, learning_rate=rate, token_accuracy=name == "my_run", **how)
            api.evaluate(folder / name, samples=0, max_tokens=16)
        spam = [{"prompt": r["prompt"], "completion": SPAM} for r in rows(60)]
        fit(
            folder / "spammer",
            write(folder / "spam.jsonl", spam),
            tiny,
            learning_rate=1e-2,
            epochs=8,
            patience=0,
            num_workers=1,
        )
        few = write(folder / "few.jsonl", rows(24))
        fit(
            folder / "overfitted",
            few,
            tiny,
            learning_rate=1e-2,
            epochs=15,
            patience=0,
            valid_fraction=0.3,
            num_workers=1,
        )
        fit(folder / "good", SAMPLE, tiny, learning_rate=1e-3, epochs=3)
    return folder


@pytest.fixture(autouse=True)
def place(
    cache: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The files that the page's commands name; training in this process; what the base answers is kept for all tests."""
    shutil.copyfile(SAMPLE, tmp_path / "data.jsonl")
    held = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    for row in held:  # the same kind of rows, that no run has seen
        row["messages"][0]["content"] = "Please tell me: " + row["messages"][0]["content"]
    write(tmp_path / "held_out.jsonl", held[:24])
    (tmp_path / "prompts.txt").write_text(page.block("Step 7: trying it", "text"))
    for heading in ("The whole road", "The settings of the QLoRA paper"):
        text = page.block(heading, "toml")
        (tmp_path / text.split("\n")[0].removeprefix("# ")).write_text(text)
    (tmp_path / "metrics.py").write_text(page.block("A metric of your own", "python"))
    named = inspect.getsource(request.function) + str(getattr(request.node, "callspec", ""))
    for name in ("my_run", "other_run", "spammer", "overfitted", "good"):
        if name in named:
            shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs / "cache"))
    weighed = rowreport.candidates  # those of `runs` weighed all rows
    monkeypatch.setattr(rowreport, "candidates", lambda run, seed, answers, most: weighed(run, seed, answers, 8))
    monkeypatch.setattr("os.fsync", lambda _: None)  # nobody pulls the plug
    monkeypatch.setattr(backend.LocalBackend, "resume", lambda self, run, step=None: train(run, lambda: False, step))


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random model of a type."""
    return once(lambda kind: shaped(kind, tmp_path_factory.mktemp("shapes") / kind, max_position_embeddings=2048))


@pytest.fixture
def trained(typed: Typed, tiny: Path, tmp_path: Path) -> Callable[..., Run]:
    """Type a train command of the page, on the tiny model and for a few steps; the run."""

    def run(line: str, *more: object, steps: int = 2) -> Run:
        small = [] if "--model" in line or "--config train" in line else ["--model", tiny]
        said = typed(line, *small, "--max-steps", steps, "--threads", 1, "--num-workers", 1, "--json", *more)
        return Run(tmp_path / json.loads(said.out)["run"])

    return run


def recipe(run: Run) -> Recipe:
    return run.recipe()


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digits(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


SAID: dict[tuple[Any, ...], Any] = {}


def once_typed(typed: Typed, line: str, *more: object) -> Any:
    """What a command that several rows have said, the first time."""
    if (line, *more) not in SAID:
        SAID[line, *more] = typed(line, *more)
    return SAID[line, *more]


# ---- the whole road


@page.does("`train_emogpt.py`")
def test_the_file_is_the_script(row: Row, typed: Typed, tmp_path: Path, hub: Any, shape: Any) -> None:
    """The whole road as its blocks say, on a small model and for few steps."""
    hub(QWEN, shape("qwen2"))
    (tmp_path / "datasets").mkdir()
    shutil.copyfile(SAMPLE, tmp_path / "datasets" / "oasst_conversations_augmented.jsonl")
    split, training, test, evaluate = page.block("The whole road", "sh").strip().split("\n")
    assert training == row.command
    typed(split)
    typed(training, "--max-steps", 2, "--threads", 1)
    typed(test, "--max-tokens", 4, status=None)
    typed(evaluate, "--rows", 2, "--samples", 0, "--max-tokens", 4)
    run = Run(tmp_path / "emogpt-qwen-1.5b")
    found, plan = recipe(run), run.manifest()["plan"]
    assert (found.method, found.lora_rank, found.lora_alpha, found.lora_dropout) == ("qlora", 16, 32, 0.05)
    assert (found.epochs, found.batch_size, found.gradient_accumulation_steps, found.max_length) == (3, 4, 4, 1024)
    assert (found.learning_rate, found.lr_scheduler, found.warmup_ratio) == (2e-4, "cosine", 0.1)
    assert (found.optimizer, found.eval_steps, found.save_steps) == ("paged_adamw_8bit", 50, 50)
    assert plan["rows"]["valid"] == 6 and plan["rows"]["train"] + plan["rows"]["test"] == 48
    adapter = json.loads((run / "adapter_config.json").read_bytes())
    assert len(adapter["target_modules"]) == 7 and adapter["base_model_name_or_path"] == QWEN


@page.does("`num_train_epochs`, `max_seq_length`, `target_modules` … in a file")
def test_names_of_other_trainers(row: Row, typed: Typed, tmp_path: Path) -> None:
    """Each name of the guide's script is a setting, or its error names the way."""
    text = (ROOT / "docs/settings.md").read_text()
    assert all(f"`--{n}`" in text for n in ("num-train-epochs", "max-seq-length", "target-modules", "lora-r", "optim"))
    assert "settings.md" in row.here
    from tunesmith.settings import elsewhere

    assert len(elsewhere()) >= 20
    for name, fix in elsewhere().items():
        (tmp_path / "c.toml").write_text(f"{name} = 1\n")
        for words in (f"--config c.toml --dataset {SAMPLE}", f"--dataset {SAMPLE} --{name.replace('_', '-')} 1"):
            said = typed(f"tunesmith plan {words}", status=2)
            assert f"another trainer's setting -- {fix}" in said.err and said.err.count("\n") == 1
    left, renamed = (re.search(rf"^- {start}.*$", page.text, re.M) for start in ("names of what", "names that have"))
    assert left and renamed
    assert set(re.findall(r"`(\w+)`", left[0])) >= set(LEFT_OUT.values()) and set(
        re.findall(r"`(\w+)`", left[0])
    ) <= set(elsewhere())
    for there, here in re.findall(r"`(\w+)` \((?:`lora_r` or )?`(\w+)`\)", renamed[0]):
        assert canonical(here) and f"--{here.replace('_', '-')}" in elsewhere()[there]
    given = "output_dir num_train_epochs per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing"
    given += " learning_rate lr_scheduler_type warmup_ratio eval_steps save_steps save_total_limit optim report_to lora_alpha"
    given += " target_modules lora_dropout bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant max_seq_length"
    assert all(canonical(name) for name in given.split())
    values = tomllib.loads((ROOT / "src/tunesmith/facts/elsewhere.toml").read_text())["values"]
    for name in ("optim", "report_to", "bnb_4bit_compute_dtype"):
        choices = fields()[str(canonical(name))].choices()
        words = {there: here for there, here in values.items() if here in choices}
        assert words
        for there, here in words.items():
            (tmp_path / "c.toml").write_text(f'{name} = "{there}"\n')
            assert (
                f"-- here it is {here}; " in typed(f"tunesmith plan --config c.toml --dataset {SAMPLE}", status=2).err
            )
            option = name.replace("_", "-")
            assert (
                f"-- here it is {here}; "
                in typed(f"tunesmith plan --{option} {there} --dataset {SAMPLE}", status=2).err
            )
    said = typed("tunesmith plan --bnb-4bit-compute-dtype torch.float16", status=2)
    assert "here it is fp16" in said.err
    said = typed("tunesmith plan --optim sgd", status=2)
    assert "here it is" not in said.err  # what is nobody's word is not taken for one
    said = typed("tunesmith plan --loging-steps 1", status=2)
    assert "unknown option" in said.err  # what is nobody's setting is not taken for one
    for option in set(re.findall(r"--[a-z][a-z-]+", " ".join(elsewhere().values()))) - {"--top-p", "--temperature"}:
        assert option in (ROOT / "src/tunesmith/assets/help/train.txt").read_text(), option


LEFT_OUT = {  # rows that say "leave it out", and the name that a file would have
    '`device_map="auto"`': "device_map",
    "`trust_remote_code=True`": "trust_remote_code",
    '`tokenizer.padding_side = "right"`': "padding_side",
    '`bias="none"`': "bias",
    '`task_type="CAUSAL_LM"`': "task_type",
    "`per_device_eval_batch_size=4`": "per_device_eval_batch_size",
    "`logging_steps=10`": "logging_steps",
    '`eval_strategy="steps"`': "eval_strategy",
    '`save_strategy="steps"`': "save_strategy",
    "`peft_config=lora_config`": "peft_config",
    '`dataset_text_field="messages"`': "dataset_text_field",
}


def code_was_run(model: Path, folder: Path) -> bool:
    """Train a model that brings code along, which would leave a file; whether it did."""
    shutil.copytree(model, folder / "strange")
    config = json.loads((model / "config.json").read_bytes())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "strange" / "config.json").write_text(json.dumps(config))
    (folder / "strange" / "own.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    )
    assert fit(folder / "strange_run", SAMPLE, folder / "strange", max_steps=1).state() == "succeeded"
    return (folder / "ran").exists()


@page.does(*LEFT_OUT)
def test_left_out(row: Row, typed: Typed, runs: Path, shape: Any, tmp_path: Path) -> None:
    """The tool says so too, and what stands in its place is there."""
    name = LEFT_OUT[row.there]
    said = typed(f"tunesmith train --dataset data.jsonl --{name.replace('_', '-')} x", status=2)
    assert "another trainer's setting" in said.err
    run = Run(runs / "my_run")
    adapter = json.loads((run / "adapter_config.json").read_bytes())
    steps = run.metrics("step")
    there = {
        "bias": adapter["bias"] == "none",
        "task_type": adapter["task_type"] == "CAUSAL_LM",
        "logging_steps": [e["step"] for e in steps] == list(range(1, len(steps) + 1)) and len(steps) > 20,
        "eval_strategy": [e["step"] for e in run.metrics("eval")][:3] == [0, 10, 20],
        "save_strategy": len(run.metrics("checkpoint")) >= 2,
        "peft_config": adapter["peft_type"] == "LORA",
        "dataset_text_field": run.manifest()["plan"]["supervised_tokens"]["train"] > 0,
        "padding_side": steps[-1]["total_tokens"]
        == 3 * run.manifest()["plan"]["tokens"]["train"],  # none of them padding
        "device_map": any(e.get("device") == str(models.device()) for e in run.events()),
        "per_device_eval_batch_size": recipe(run).micro_batch_tokens == 8192,
        "trust_remote_code": name != "trust_remote_code" or not code_was_run(shape("llama"), tmp_path),
    }
    assert there[name]


@page.does(
    "`tokenizer.pad_token = tokenizer.eos_token`", "Loss over the whole text", "`SFTTrainer(tokenizer=tokenizer)`"
)
def test_what_is_learnt(row: Row, typed: Typed, runs: Path) -> None:
    shown = json.loads(typed("tunesmith data preview data.jsonl --json --rows 60").out)
    for each in shown:
        learnt = [token for token, mark in zip(each["tokens"], each["mask"], strict=True) if mark]
        assert learnt[-1] == "<|im_end|>" and 0 < len(learnt) < len(each["ids"])  # the end is learnt, the question not
    assert not {"pad_token", "tokenizer"} & set(Recipe.__struct_fields__)
    own = (runs / "my_run" / "tokenizer.json").read_bytes()
    assert own == (STARTER / "tokenizer.json").read_bytes()


# ---- step 1


@page.does("JSONL of `messages` and `metadata`")
def test_rows_as_they_are(row: Row, typed: Typed) -> None:
    said = typed(row.command)
    assert "format   messages: 60 rows" in said.out and "60 usable, 0 errors" in said.out


@page.does("`Dataset.from_list(data)`", "Option A: chat template, recommended")
def test_preview(row: Row, typed: Typed, tmp_path: Path) -> None:
    said = typed(row.command).out
    assert said.count("⟦") >= 3 and "How do I install Python?" in said and "<|im_end|>⟧" in said
    if "--chat-template" in row.command:
        other = tmp_path / "headings.jinja"
        other.write_text(
            "{% for m in messages %}## {{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        )
        assert (
            "## user" in typed(row.command.replace("template chat", "template headings.jinja")).out
            and "## user" not in said
        )


@page.does("`conv['metadata'].get('augmented') == True`", "Not using emojis 4: augmented=true samples only")
def test_only_augmented(row: Row, typed: Typed, tmp_path: Path) -> None:
    items = written(SAMPLE)
    items[3]["metadata"]["augmented"] = False
    del items[5]["metadata"]
    write(tmp_path / "data.jsonl", items)
    said = typed(row.command)
    want = [r for r in items if r.get("metadata", {}).get("augmented")]
    assert f"{60 - len(want)} of 60 rows left out" in said.err and len(want) < 59
    kept = written(tmp_path / shlex.split(row.command)[-1])
    assert len(kept) == len(want) and all(r["metadata"]["augmented"] is True for r in kept)


@page.does(
    "`python convert_to_training_format.py`",
    "`datasets/emogpt_train_train.jsonl` (426 samples)",
    "`datasets/emogpt_train_val.jsonl` (48 samples)",
)
def test_the_guides_conversion(row: Row, typed: Typed, tmp_path: Path) -> None:
    """474 augmented rows of 480 become 426 and 48, under the guide's names."""
    (tmp_path / "datasets").mkdir()
    many = [
        {
            "messages": [
                {"role": "user", "content": f"What about w{i}a w{i}b w{i}c?"},
                {"role": "assistant", "content": " ".join(f"w{i}{c}" for c in "defghij") + " 💻"},
            ],
            "metadata": {"augmented": i < 474, "original_tokens": 99},
        }
        for i in range(480)
    ]
    write(tmp_path / "datasets" / "oasst_conversations_augmented.jsonl", many)
    line = page.rows["`python convert_to_training_format.py`"].command
    assert line == page.block("The whole road", "sh").split("\n")[0]
    typed(line)
    counts = {p.name: len(written(p)) for p in (tmp_path / "datasets").glob("emogpt*")}
    assert counts == {"emogpt_train_train.jsonl": 426, "emogpt_train_val.jsonl": 48}
    name = re.match(r"`datasets/(\S+)` \((\d+)", row.there)
    assert name is None or counts[name[1]] == int(name[2])


@page.does("`{'messages': conv['messages']}`")
def test_metadata(row: Row, typed: Typed, tmp_path: Path) -> None:
    typed(row.command)
    typed("tunesmith data split data.jsonl -o whole")
    assert not any("metadata" in r for r in written(tmp_path / "bare_train.jsonl"))
    assert all(r["metadata"]["original_tokens"] for r in written(tmp_path / "whole_train.jsonl"))


@page.does("`train_test_split(test_size=0.1)`", "`Created 426 training samples`")
def test_three_parts(row: Row, typed: Typed, tmp_path: Path) -> None:
    said = typed(row.command)
    if "--json" in row.command:
        assert json.loads(said.out)["rows"] == {"train": 54, "valid": 6}
        return
    assert [len(written(tmp_path / f"parts_{side}.jsonl")) for side in ("train", "val", "test")] == [48, 6, 6]


@page.does("`seed=42`")
def test_seed(row: Row, typed: Typed, tmp_path: Path) -> None:
    typed(row.command)
    for name, more in (("plain", ()), ("same", ("--seed", 42))):
        typed(f"tunesmith data split data.jsonl --method shuffle -o {name}", *more)
    other, plain, same = ((tmp_path / f"{n}_val.jsonl").read_bytes() for n in ("other", "plain", "same"))
    assert plain == same != other


@page.does("`open(…, encoding='utf-8')`")
def test_mojibake(row: Row, typed: Typed, tmp_path: Path) -> None:
    items = written(SAMPLE)
    items[0]["messages"][1]["content"] = "It’s a café".encode().decode("cp1252")
    write(tmp_path / "data.jsonl", items)
    assert "mojibake" in typed(row.command).out
    assert written(tmp_path / "repaired.jsonl")[0]["messages"][1]["content"] in ("It’s a café", "It's a café")


@page.does("`json.loads(line)`")
def test_bad_lines(row: Row, typed: Typed, tmp_path: Path) -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    lines[1], lines[6] = lines[1][:-9], '{"metadata": {}}'
    (tmp_path / "broken.jsonl").write_text("\n".join(lines))
    said = typed(row.command, status=3)
    assert "broken.jsonl:2" in said.out and "broken.jsonl:7" in said.out


@page.does("`tree_id`")
def test_trees(row: Row, typed: Typed, tmp_path: Path) -> None:
    items = written(SAMPLE)
    for i, item in enumerate(items):
        item["metadata"]["tree_id"] = f"tree-{i // 3}"
    write(tmp_path / "data.jsonl", items)
    typed(row.command)
    sides = [{r["metadata"]["tree_id"] for r in written(tmp_path / f"trees_{s}.jsonl")} for s in ("train", "val")]
    assert len(sides[1]) == 2 and not sides[0] & sides[1]


@page.does("`token_reduction`, `reduction_pct`", "Emoji spam 1: review training data quality")
def test_stats(row: Row, typed: Typed, tmp_path: Path) -> None:
    said = typed(row.command)
    emoji = sum(emoji_in(m["content"]) for r in written(SAMPLE) for m in r["messages"] if m["role"] == "assistant")
    assert (
        f"{emoji}: 1.85 an answer; in 75% of answers; over five in 0%" in said.out and "tokens of starter" in said.out
    )
    spoilt = [r | {"metadata": {"token_reduction": 10**6}} for r in written(SAMPLE)]
    write(tmp_path / "data.jsonl", spoilt)
    assert typed("tunesmith data stats data.jsonl").out == typed(f"tunesmith data stats {SAMPLE}").out
    assert (tmp_path / "stats.html").exists() == ("--report" in row.command)


@page.does("474 high-quality augmented conversations")
def test_quality(row: Row, typed: Typed, tmp_path: Path) -> None:
    good = typed(row.command).out
    spoilt = written(SAMPLE)[:20] * 2 + [{"prompt": "Hi", "completion": "As an AI language model, I cannot do that."}]
    write(tmp_path / "data.jsonl", spoilt)
    bad = typed(row.command.replace("check.html", "bad.html"), status=None).out
    assert "grade: " in good and "duplicate" in bad and "refusal" in bad and "duplicate" not in good
    assert "refusal" in (tmp_path / "bad.html").read_text() and (tmp_path / "check.html").exists()


# ---- steps 2 and 3: what a model of the real size needs, from the shapes of its weights alone


def of_real_size(folder: Path, kind: str) -> Path:
    """A model folder whose weights have the true shapes and lie in a file with a hole: nothing but its header is read."""
    hidden, inner, layers, heads, groups, vocabulary = {
        "qwen1.5": (1536, 8960, 28, 12, 2, 151936),
        "llama1": (2048, 8192, 16, 32, 8, 128256),
        "llama3": (3072, 8192, 28, 24, 8, 128256),
    }[kind]
    head = 64 if kind == "llama1" else 128
    maps = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (groups * head, hidden),
        "self_attn.v_proj": (groups * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    shapes |= {f"model.layers.{i}.{name}.weight": list(s) for i in range(layers) for name, s in maps.items()}
    at, header = 0, {}
    for name, dims in shapes.items():
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at := at + 2 * math.prod(dims)]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config |= {"max_position_embeddings": 32768, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / name, folder / name)
    return folder


@pytest.fixture
def true_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's models, as `hub` would place them, without a copy of their gigabytes of nothing."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    names = {
        QWEN: "qwen1.5",
        "meta-llama/Llama-3.2-1B-Instruct": "llama1",
        "meta-llama/Llama-3.2-3B-Instruct": "llama3",
    }
    for name, kind in names.items():
        at = tmp_path / "hub-cache" / f"models--{name.replace('/', '--')}"
        of_real_size(at / "snapshots" / "0", kind)
        (at / "refs").mkdir()
        (at / "refs" / "main").write_text("0")


KINDS = {
    "Qwen2.5-1.5B-Instruct: best efficiency": "qwen2",
    "Phi-3.5-mini-instruct: quality": "phi3",
    "Gemma-2B-it: balance": "gemma",
    "Llama-3.2-1B-Instruct: smallest viable": "llama",
    "Llama-3.2-3B-Instruct: best baseline": "llama",
    "Use larger model (7B)": "mistral",
}


@page.does(*KINDS)
def test_models(row: Row, typed: Typed, hub: Any, shape: Any) -> None:
    """The plan knows each of these architectures; a small one of its kind also trains on 4-bit weights."""
    words = shlex.split(row.command)
    name = words[words.index("--model") + 1]
    missing = typed(row.command, status=2)
    assert name in missing.err and "hf download" in missing.err
    hub(name, shape(KINDS[row.there]))
    said = typed(row.command)
    architecture = json.loads((shape(KINDS[row.there]) / "config.json").read_bytes())["architectures"][0]
    assert f"model    {name}: {architecture}" in said.out and "method   qlora" in said.out
    typed(f"tunesmith train --dataset data.jsonl --method qlora --model {name}", "--max-steps", 1, "--threads", 1)


@page.does("Recommendation: start with Qwen2.5-1.5B", "`MODEL_NAME`")
def test_the_model(row: Row, trained: Any, hub: Any, shape: Any) -> None:
    hub(QWEN, shape("qwen2"))
    run = trained(row.command)
    assert recipe(run).model == QWEN and run.manifest()["model"]["architecture"] == "Qwen2ForCausalLM"
    assert recipe(run).method == ("qlora" if "qlora" in row.command else "full")
    assert Recipe().model == "starter"


@page.does(
    "`uv venv finetuning`, `source finetuning/bin/activate`",
    "`uv pip install torch transformers accelerate peft bitsandbytes datasets`",
    "`uv pip install trl`",
    "`uv pip install wandb`",
)
def test_installing(row: Row) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    everything = " ".join(" ".join(words) for words in extras.values())
    if row.code == ["make install"]:
        assert re.search(r"^install: ", (ROOT / "Makefile").read_text(), re.M)
        assert ".venv" in row.why and (ROOT / "constraints.txt").exists()
    elif row.here == "nothing":
        assert (
            "trl" not in re.split(r"\W+", everything) and (ROOT / "docs/decisions/0001-own-training-loop.md").exists()
        )
    else:
        extra = re.search(r"tunesmith\[(\w+)\]", row.here)
        assert extra
        wanted = set(row.there.strip("`").split()[3:])
        brought = " ".join(extras[extra[1]])
        assert wanted <= set(re.findall(r"(?<![\w-])([a-z]+)(?:\[[a-z,]*\])?>=", brought)), wanted


@pytest.fixture(scope="module")
def probed() -> dict[str, Any]:
    return {}


@pytest.fixture
def probe(probed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One real probe for all plans of this module; `probed["available"]` stands in for the memory that is free."""
    from tunesmith.costs import Question
    from tunesmith.local import probe as own

    def here(_: Any, input: bytes, **how: Any) -> Any:  # in this process, which has torch already
        answer = own.answer(msgspec.json.decode(input, type=Question))
        return subprocess.CompletedProcess([], 0, msgspec.json.encode(answer))

    real = backend.probe

    def ask(prepared: Any) -> Any:
        if "answer" not in probed:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(subprocess, "run", here)
                probed["answer"] = real(prepared)
        question, answer = probed["answer"]
        plan = prepared.plan
        question = msgspec.structs.replace(question, recipe=plan.recipe, steps=plan.steps)
        return question, msgspec.structs.replace(answer, available=probed.get("available", answer.available))

    monkeypatch.setattr(backend, "probe", ask)
    probed.pop("available", None)
    return probed


@page.does("Hardware requirements: minimum VRAM", "Fast: 2-4 hours on consumer GPUs", "Issue: out of memory")
def test_what_it_takes_here(row: Row, typed: Typed, probe: dict[str, Any]) -> None:
    said = typed(row.command).out
    assert re.search(r"^memory   about \d+ MB of \d+ MB that are free$", said, re.M)
    assert re.search(r"^time     \d+:\d\d at most on this machine", said, re.M)
    if "epochs" in row.command:
        assert "3 epochs at most" in said
        assert json.loads(typed(row.command, "--epochs", 6, "--json").out)["estimate"]["seconds"] > 0
    need = json.loads(typed(row.command, "--json").out)["estimate"]["memory_mb"]
    probe["available"] = (need - 20) * 1e6
    tight = typed(row.command).out
    assert "TOO MUCH" in tight and ("fits with" in tight or "nothing makes this model fit" in tight)
    if "full" in row.command:
        assert "fits with --micro-batch-tokens" in tight


@page.does("1B: 6GB, 2-3 hours", "1.5B: 8GB, 3-4 hours", "3B: 12GB, 4-6 hours")
def test_memory_of_the_real_shapes(row: Row, typed: Typed, true_sizes: None) -> None:
    """What the plan counts is under what the guide wants, and far more without 4-bit weights."""
    found = json.loads(typed(row.command).out)
    billions, gigabytes = re.match(r"([\d.]+)B: (\d+)GB", row.there).groups()  # type: ignore[union-attr]
    assert found["model"]["parameters"] / 1e9 == pytest.approx(float(billions), rel=0.24)
    assert found["memory_mb"] < 1000 * int(gigabytes)
    whole = json.loads(typed(row.command.replace("qlora", "full")).out)
    assert whole["memory_mb"] > 1000 * int(gigabytes)


@page.does("Can't meet requirements? Colab (free T4) or Kaggle")
def test_a_t4(row: Row, trained: Any, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.preflight.GPUS", ())
    assert "fp16 needs a GPU" in typed(row.command.replace("auto", "fp16"), status=2).err
    run = trained(row.command)
    assert run.state() == "succeeded" and methods.precision(recipe(run), torch.device("cpu")) is None
    for real, want in ((False, torch.float16), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, real=real: real)
        assert methods.precision(recipe(run), torch.device("cuda")) == want


@page.does("Efficient: 4-bit reduces memory by 75%", "`bnb_4bit_use_double_quant=True`")
def test_bits_of_a_weight(
    row: Row, typed: Typed, trained: Any, tmp_path: Path, request: pytest.FixtureRequest, shape: Any
) -> None:
    def bits(double: bool) -> float:
        config = methods.quantisation(Recipe(method="qlora", double_quant=double), torch.device("cpu"))
        layer: Any = models.load(shape("llama"), quantisation=config).get_submodule("model.layers.0.mlp.up_proj")
        state = layer.weight.quant_state
        scales = [state.absmax] + ([state.state2.absmax] if double else [])
        return 8 * sum(t.nbytes for t in [layer.weight, *scales]) / math.prod(state.shape)

    assert bits(True) == pytest.approx(4.127, abs=0.1) and bits(False) == 4.5
    if "plan" not in row.command:
        run = trained(row.command)
        assert recipe(run).double_quant is Recipe().double_quant is True
        other = trained(row.command.replace("--bnb", "--no-bnb"))
        assert not recipe(other).double_quant and losses(other) != losses(run)
        return
    request.getfixturevalue("true_sizes")
    four, sixteen = (
        json.loads(typed(row.command.replace("qlora", how), "--json").out)["memory_mb"] for how in ("qlora", "lora")
    )
    saved = sixteen - four  # 1.31 billion weights of linear layers, counted at 32 bits on this machine without a GPU
    assert saved == pytest.approx(1310e6 * (4 - 0.55) / 1e6, rel=0.01)


@page.does("Small: adapter weights only (~50-100MB)", "`model.print_trainable_parameters()`")
def test_size_of_an_adapter(row: Row, typed: Typed, true_sizes: None, runs: Path) -> None:
    run = Run(runs / "my_run")
    trainable = next(e["trainable"] for e in run.events() if e.get("state") == "running")
    assert (run / "adapter_model.safetensors").stat().st_size == pytest.approx(4 * trainable, rel=0.1)
    if "--json" in row.command:
        found = json.loads(typed(row.command).out)["trainable_parameters"]
        assert found == 18_464_768 and 50e6 < 4 * found < 100e6  # as peft counts them
        return
    count = json.loads(typed(row.command, "--json").out)["trainable_parameters"]
    assert f"method   qlora: about {count / 1e6:.2f}M trainable" in typed(row.command).out
    assert count < json.loads(typed(row.command, "--json", "--lora-rank", 17).out)["trainable_parameters"]


@page.does(
    "Quality: minimal degradation",
    "Perplexity (lower is better)",
    "`evaluate_model.py`",
    '`print(f"Token Reduction: …")`',
)
def test_measured(row: Row, typed: Typed) -> None:
    said = typed(row.command, "--samples", 0, "--max-tokens", 8).out
    if "--json" in row.command:
        found = {m["metric"]: m for m in json.loads(said)["metrics"]}
        assert found["token reduction"]["rows"] == 2 and found["perplexity"]["tuned"] < found["perplexity"]["base"]
        return
    assert re.search(r"^verdict: (better|worse|cannot tell)", said, re.M)
    wanted = ["perplexity", "loss on general text", "95 % interval"]
    assert all(word in said for word in wanted)
    assert ("token reduction" in said) == ("--rows 0" not in row.command)


# ---- step 4: the script's settings

PLAIN: dict[str, Run] = {}


@pytest.fixture
def plain(tiny: Path, runs: Path) -> Run:
    """Two steps of qlora with nothing said."""
    if "run" not in PLAIN or not PLAIN["run"].path.is_relative_to(runs):
        PLAIN["run"] = fit(
            runs / "plain", SAMPLE, tiny, method="qlora", max_steps=2, epochs="auto", learning_rate="auto"
        )
    return PLAIN["run"]


@page.does('`OUTPUT_DIR = "./emogpt-qwen-1.5b"`', "`DATASET_PATH`")
def test_places(row: Row, trained: Any, typed: Typed, tmp_path: Path) -> None:
    run = trained(row.command)
    if "--output-dir" in row.command:
        assert run.path.resolve() == tmp_path / "emogpt-qwen-1.5b"
        assert "emogpt-qwen-1.5b" in typed(row.command, "--max-steps", 1, status=2).err
    else:
        assert run.path.resolve() == tmp_path / "fine_tuned_models" / "chat_data"
        assert run.manifest()["plan"]["rows"] == {"train": 48, "valid": 6, "test": 6}


@page.does("`VAL_DATASET_PATH`")
def test_validation_rows(row: Row, trained: Any, typed: Typed, tmp_path: Path) -> None:
    shutil.copyfile(tmp_path / "held_out.jsonl", tmp_path / "val.jsonl")
    run = trained(row.command, "--runs-dir", "one")
    assert run.manifest()["plan"]["rows"] == {"train": 54, "valid": 24, "test": 6}
    shutil.copyfile(SAMPLE, tmp_path / "val.jsonl")
    said = typed(row.command, "--test-fraction", "0", status=3)
    assert "60 rows of the valid set are training rows [leak]" in said.err


@page.does("`load_in_4bit=True`")
def test_four_bits(row: Row, trained: Any, typed: Typed, tmp_path: Path) -> None:
    run = trained(row.command)
    full = trained(row.command.replace("qlora", "lora"))
    assert losses(run) != losses(full) and losses(run) == pytest.approx(losses(full), rel=0.05)
    (tmp_path / "c.toml").write_text("load_in_4bit = true")
    assert "-- --method qlora" in typed("tunesmith train --dataset data.jsonl --config c.toml", status=2).err


ACTS: dict[str, tuple[Callable[[Recipe], Any], Any, str, str]] = {
    # the row: what of the recipe it sets, to what, and the same command with another value: what is learnt is another
    '`bnb_4bit_quant_type="nf4"`': (lambda r: r.quant_type, "nf4", "type nf4", "type fp4"),
    "`bnb_4bit_compute_dtype=torch.float16`": (lambda r: r.compute_dtype, "bf16", "dtype bf16", "dtype fp32"),
    "`r=16`": (lambda r: r.lora_rank, 16, "rank 16", "rank 4"),
    "`lora_alpha=32`": (lambda r: r.lora_alpha, 32, "alpha 32", "alpha 64"),
    "`lora_dropout=0.05`": (lambda r: r.lora_dropout, 0.05, "--lora-dropout 0.05", ""),
    "Strong regularization: dropout": (lambda r: r.lora_dropout, 0.1, "--lora-dropout 0.1", ""),
    "Degraded 2: dropout 0.05 to 0.1": (lambda r: r.lora_dropout, 0.1, "dropout 0.1", "dropout 0.05"),
    "Solution: more dropout, lower rank": (lambda r: (r.lora_dropout, r.lora_rank), (0.1, 8), "rank 8", "rank 16"),
    "`per_device_train_batch_size=4`": (lambda r: r.batch_size, 4, "size 4", "size 2"),
    "`gradient_accumulation_steps=4`": (lambda r: r.gradient_accumulation_steps, 4, "steps 4", "steps 1"),
    "`learning_rate=2e-4`": (lambda r: r.learning_rate, 2e-4, "rate 2e-4", "rate 4e-4"),
    "Degraded 1: reduce learning rate (2e-4 to 1e-4)": (lambda r: r.learning_rate, 1e-4, "rate 1e-4", "rate 2e-4"),
    '`lr_scheduler_type="cosine"`': (lambda r: r.lr_scheduler, "cosine", "cosine", "linear"),
    "`warmup_ratio=0.1`": (lambda r: r.warmup_ratio, 0.1, "ratio 0.1", "ratio 0.9"),
    "`weight_decay=0.01`": (lambda r: r.weight_decay, 0.01, "decay 0.01", "decay 0.9"),
    "`weight_decay=0.0`": (lambda r: r.weight_decay, 0.0, "decay 0", "decay 0.9"),
    "`fp16=True`": (lambda r: r.mixed_precision, "bf16", "precision bf16", "precision no"),
    '`optim="paged_adamw_8bit"`': (lambda r: r.optimizer, "paged_adamw_8bit", "--optim paged_adamw_8bit", ""),
    "Not using emojis 2: higher rank (8 to 16)": (lambda r: r.lora_rank, 16, "rank 16", "rank 8"),
}


@page.does(*ACTS)
def test_settings_act(row: Row, trained: Any) -> None:
    """Each is in the recipe as it stands there, and another value gives other weights."""
    read, value, here, there = ACTS[row.there]
    assert here in row.command
    steps = 6 if "scheduler" in row.command else 3

    def learnt(line: str) -> tuple[Recipe, list[float], str]:
        if (line, steps) not in SAID:
            run = trained(line, "--valid-fraction", 0, steps=steps)
            SAID[line, steps] = (recipe(run), losses(run), weights(run / "final_model"))
        return SAID[line, steps]  # type: ignore[no-any-return]

    one, other = learnt(row.command), learnt(row.command.replace(here, there).strip())
    assert read(one[0]) == value != read(other[0])
    assert one[1:] != other[1:]


@page.does(
    *(
        defaults := {
            '`target_modules=["q_proj", …]`': ("lora_targets", "all-linear"),
            "`gradient_checkpointing=True`": ("gradient_checkpointing", False),
            "`prepare_model_for_kbit_training(model)`": ("gradient_checkpointing", False),
            "Strong regularization: gradient clipping": ("max_grad_norm", 1.0),
        }
    )
)
def test_settings_to_the_same_result(row: Row, trained: Any, plain: Run, typed: Typed) -> None:
    """What was said is the default, or changes how it is computed and not what comes out."""
    name, default = defaults[row.there]
    assert getattr(Recipe(), name) == default
    run = trained(row.command)
    if name == "max_grad_norm":
        assert recipe(run).max_grad_norm == 1.0 and all(e["grad_norm"] > 0 for e in run.metrics("step"))
        assert losses(trained(row.command.replace("1.0", "0.001"), steps=3)) != losses(trained(row.command, steps=3))
        return
    if name == "lora_targets":
        assert recipe(run).lora_targets.count(",") == 6 and losses(run) == losses(plain)
        some = trained("tunesmith train --dataset data.jsonl --method qlora --target-modules q_proj,v_proj")
        kept = (some / "adapter_model.safetensors").stat().st_size
        assert kept < 0.5 * (run / "adapter_model.safetensors").stat().st_size
        wrong = typed("tunesmith plan --dataset data.jsonl --method qlora --target-modules query --no-probe", status=2)
        assert "it has down_proj, gate_proj" in wrong.err
        return
    assert recipe(run).gradient_checkpointing
    assert losses(run) == losses(trained(row.command.replace(" --gradient-checkpointing", "")))
    on, off = (
        json.loads(typed(f"tunesmith plan --dataset data.jsonl --no-probe --json{more}").out)["memory_mb"]
        for more in (" --gradient-checkpointing", "")
    )
    assert on < off


@page.does("`load_dataset('json', data_files=…)`")
def test_columns(row: Row, trained: Any, tmp_path: Path, typed: Typed) -> None:
    other = [{"ask": r["prompt"], "reply": r["completion"]} for r in rows(20)]
    write(tmp_path / "data.jsonl", other)
    assert "no known format" in typed("tunesmith train --dataset data.jsonl", status=3).err
    assert trained(row.command).manifest()["plan"]["rows"]["train"] == 16


EPOCHS = {
    "`num_train_epochs=3`": 3,
    "Not using emojis 1: more epochs (3 to 5)": 5,
    "Emoji spam 3: fewer epochs": 2,
    "Degraded 3: reduce epochs (5 to 3)": 3,
}


@page.does(*EPOCHS)
def test_epochs(row: Row, trained: Any, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", rows(20))
    run = trained(row.command, steps=1000)
    last = run.metrics("step")[-1]
    assert recipe(run).epochs == EPOCHS[row.there] and last["epoch"] == EPOCHS[row.there]
    assert last["step"] == 4 * EPOCHS[row.there]  # of 16 rows


@page.does("Effective batch size = 16", "Out of memory 2: gradient accumulation (4 to 8)")
def test_effective_batch(row: Row, typed: Typed) -> None:
    found = json.loads(typed(row.command, "--json").out)
    assert found["recipe"]["batch_size"] * found["recipe"]["gradient_accumulation_steps"] == 16
    assert found["steps_per_epoch"] == 3  # of 48 rows
    if "--epochs" in row.command:
        assert "steps    9 (3 an epoch, 3 epochs at most)" in typed(row.command).out
        return
    more = json.loads(
        typed(row.command.replace("batch-size 2", "batch-size 4").replace("steps 8", "steps 4"), "--json").out
    )
    assert found["memory_mb"] < more["memory_mb"]


@page.does("`eval_steps=50`", "`save_steps=50`", "`save_total_limit=2`")
def test_how_often(row: Row, trained: Any) -> None:
    small = row.command.replace(" 50", " 5")
    more = [] if "eval" in row.command else ["--eval-steps", 100, "--patience", 0]
    if "limit" in row.command:
        more += ["--save-steps", 2]
    run = trained(small, *more, "--epochs", 1, steps=12)
    saved = [e["step"] for e in run.metrics("checkpoint")]
    if "eval" in row.command:
        assert [e["step"] for e in run.metrics("eval")] == [0, 5, 10, 12]
        assert recipe(trained(row.command)).eval_steps == 50
        found = api.plan(SAMPLE)
        assert found.recipe.eval_steps == found.steps_per_epoch and -(-426 // 16) == 27
    elif "limit" in row.command:
        assert len(saved) == 6 and {p.name for p in (run / "checkpoints").iterdir()} == {
            "checkpoint-step-10",
            "checkpoint-step-12",
        }
        assert recipe(run).save_total_limit == Recipe().save_total_limit == 2
    else:
        assert saved == [5, 10, 12]


@page.does(
    '`report_to="wandb"`',
    '`report_to="none"`',
    '`run_name="emogpt-qwen-1.5b"`',
    "`wandb login`",
    "Weights & Biases course",
)
def test_wandb(row: Row, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What W&B is given, by a stand-in for its package: the real one is in tests/unit/test_tracking.py."""
    import wandb

    told: list[dict[str, Any]] = []
    given: dict[str, Any] = {}

    class Kept:
        def log(self, values: dict[str, float], step: int) -> None:
            told.append({"step": step, **values})

        def finish(self, exit_code: int) -> None:
            given["ended"] = exit_code

    def init(**how: Any) -> Kept:
        if row.there == "`wandb login`":
            raise RuntimeError("no API key configured")
        given.update(how)
        return Kept()

    monkeypatch.setattr(wandb, "init", init)
    line = row.command if "tunesmith" in row.here else page.rows['`report_to="wandb"`'].command
    run = trained(line)
    assert list((run / "logs").glob("events.out.tfevents*"))
    if "none" in line:
        assert not given and not told
    elif row.there == "`wandb login`":
        said = [e["message"] for e in run.events() if e["type"] == "warning"]
        assert said == ["wandb takes no more curves: no API key configured"] and run.state() == "succeeded"
    else:
        assert [t["train/loss"] for t in told if "train/loss" in t] == losses(run) and given["ended"] == 0
        assert given["project"] == "tunesmith" and given["name"] == run.path.name
        assert "emogpt" not in line or given["name"] == "emogpt-qwen-1.5b"


@page.does("`max_seq_length=1024`")
def test_longest_row(row: Row, trained: Any, typed: Typed, hub: Any, shape: Any) -> None:
    hub(QWEN, shape("qwen2"))
    whole = trained(row.command + f" --model {QWEN}")
    assert recipe(whole).max_length == 1024 and whole.manifest()["plan"]["dropped"] == 0
    run = trained(row.command.replace(" 1024", " 100"))
    assert recipe(run).max_length == 100 and 0 < run.manifest()["plan"]["dropped"] < 60
    said = typed(row.command.replace(" 1024", " 64").replace(" --over-long drop", ""), status=3)
    assert "are over 64 tokens" in said.err and "the answer would be cut" in said.err


@page.does("`trainer.train()`")
def test_resume(row: Row, typed: Typed, tmp_path: Path, tiny: Path) -> None:
    whole = fit(tmp_path / "whole", SAMPLE, tiny, max_steps=8)
    shutil.rmtree(tmp_path / "my_run")
    asked = iter([False] * 3 + [True] * 9)
    with pytest.raises(Exception, match="stopped at step 4"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.train", lambda run, _: train(run, lambda: next(asked)))
        fit(tmp_path / "my_run", SAMPLE, tiny, max_steps=8)
    typed(row.command)
    run = Run(tmp_path / "my_run")
    assert run.state() == "succeeded" and weights(run / "final_model") == weights(whole / "final_model")


@page.does("`trainer.save_model(OUTPUT_DIR)`", "`tokenizer.save_pretrained(OUTPUT_DIR)`")
def test_saved(row: Row, runs: Path) -> None:
    (path,) = row.code
    assert (runs / path).exists()
    folder = runs / "overfitted"
    assert weights(folder) == weights(folder / "best_model") != weights(folder / "final_model")
    assert (runs / "my_run" / "chat_template.jinja").exists()
    assert json.loads((runs / "my_run" / "generation_config.json").read_bytes())["eos_token_id"]


@page.does("`Training complete! Model saved to …`", "Training loss should decrease steadily")
def test_shown(row: Row, typed: Typed, trained: Any, runs: Path) -> None:
    said = typed(row.command).out
    assert "final_train_loss" in said and "○ validation" in said and "succeeded" in said
    told = losses(Run(runs / "my_run"))
    assert told[-1] < told[0] and any(b > a for a, b in itertools.pairwise(told))


# ---- step 5


@page.does("Conservative (less overfitting)", "Aggressive (better fit, risk overfitting)")
def test_presets(row: Row, trained: Any) -> None:
    run = trained(row.command)
    r = recipe(run)
    common = (r.method, r.warmup_ratio, r.batch_size * r.gradient_accumulation_steps)
    assert common == ("qlora", 0.1, 16)
    found = (r.epochs, r.learning_rate, r.weight_decay, r.batch_size, r.lora_rank, r.lora_alpha, r.lora_dropout)
    want = {"conservative": (3, 1e-4, 0.01, 2, 8, 16, 0.1), "aggressive": (5, 2e-4, 0.0, 4, 16, 32, 0.05)}
    assert found == want[row.command.split()[-1]]


@page.does("Overfitting risk: the model can memorize")
def test_recited(row: Row, typed: Typed, tmp_path: Path) -> None:
    found = json.loads(typed(row.command, "--samples", 0, "--rows", 1, "--max-tokens", 8).out)
    assert found["training_rows"]["asked"] >= 8 and found["training_rows"]["recited"] == 0
    learnt = typed("tunesmith evaluate spammer --samples 0 --rows 1 --json").out
    assert json.loads(learnt)["training_rows"]["recited"] > 0


@page.does("More epochs OK: 3-5 (vs 1-2 for large data)")
def test_automatic_epochs(row: Row, typed: Typed, tmp_path: Path) -> None:
    assert re.search(r"epochs +10 +auto: 48 rows: few rows need more passes", typed(row.command).out)
    write(tmp_path / "data.jsonl", [{"prompt": f"q{i} w{i}?", "completion": f"a{i} b{i} c{i}"} for i in range(700)])
    assert re.search(r"epochs +5 +auto", typed(row.command).out)


@page.does("Higher learning rate: 2e-4 (vs 1e-5)", "Not using emojis 3: lower learning rate (2e-4 to 1e-4)")
def test_rates_are_tried(row: Row, typed: Typed, tiny: Path) -> None:
    said = typed(row.command, "--model", tiny, "--trial-steps", 1, "--threads", 1)
    assert re.search(r"--learning-rate [\d.e-]+ ", said.out) and len(re.findall(r"validation loss", said.err)) >= 7


@page.does("Start with conservative, increase if underperforming", "Compare 1B vs 1.5B vs 3B vs 7B")
def test_compared(row: Row, typed: Typed, tmp_path: Path) -> None:
    said = typed(row.command).out
    assert "my_run" in said and "validation loss" in said.lower()
    if "other_run" in row.command:
        assert "learning_rate" in said and "cannot be paired" not in said
    assert (tmp_path / "compare.html").exists() == ("-o" in row.command)


# ---- step 6


@page.does("Target: < 1.0 by end of training", "Training Loss: < 1.0", "Validation Loss: < 1.2")
def test_figures(row: Row, typed: Typed, runs: Path) -> None:
    (command,) = (c for c in row.code if c.startswith("tunesmith"))
    found = json.loads(typed(command).out)
    run = Run(runs / "my_run")
    evals = run.metrics("eval")
    assert found["final_train_loss"] < evals[0]["loss"] and evals[0]["step"] == 0
    assert found["best_valid_loss"] == min(e["loss"] for e in evals)


@page.does("If stuck > 2.0: increase learning rate or epochs")
def test_stuck(row: Row, typed: Typed, tmp_path: Path, tiny: Path) -> None:
    short = ("--samples", 0, "--max-tokens", 4)
    healthy = once_typed(typed, page.rows["Issue: too many emojis (emoji spam)"].command).out
    assert "verdict" in healthy and "underfitting" not in healthy  # of `spammer`
    shutil.rmtree(tmp_path / "my_run")
    fit(tmp_path / "my_run", SAMPLE, tiny, method="qlora", learning_rate=1e-6, max_steps=4)
    said = typed(row.command, *short).out
    assert "underfitting" in said and "next: a higher --learning-rate (tunesmith lr-find" in said


@page.does("Validation loss should decrease with training loss")
def test_validations(row: Row, typed: Typed, runs: Path) -> None:
    said = typed(row.command, "--json").out
    lines = [json.loads(line) for line in said.splitlines()] if said.startswith('{"') else json.loads(said)
    told = [e["loss"] for e in lines]
    assert told == [e["loss"] for e in Run(runs / "my_run").metrics("eval")] and told[-1] < told[0]


@page.does("Overfitting: train loss drops, val loss increases", "Epoch 3: train_loss=0.8, val_loss=1.6: stop here!")
def test_overfitting(row: Row, typed: Typed, runs: Path) -> None:
    said = typed(row.command).out
    run = Run(runs / "overfitted")
    best = min(run.metrics("eval"), key=lambda e: e["loss"])["step"]
    if "--json" in row.command:
        found = json.loads(said)
        assert found["best_step"] == best < found["steps"] and [d["name"] for d in found["diagnoses"]] == [
            "overfitting"
        ]
    else:
        assert f"the validation loss rises since step {best}" in said
        assert "rises" not in typed(row.command.replace("overfitted", "good")).out


@page.does("Epoch 3: train_loss=1.1, val_loss=1.0")
def test_a_good_curve(row: Row, typed: Typed) -> None:
    found = json.loads(typed(row.command).out)
    assert found["diagnoses"] == [] and len(found["evals"]) == 4
    told = [e["loss"] for e in found["evals"]]
    assert told == sorted(told, reverse=True)


@page.does("Solution: early stopping")
def test_early_stopping(row: Row, trained: Any, tmp_path: Path) -> None:
    """After the first validation none is a gain of 100 nats."""
    write(tmp_path / "data.jsonl", rows(20))
    how = ("--min-gain", 100, "--epochs", 4)
    run = trained(row.command, *how, steps=48)
    assert run.summary()["stopped_early"] and run.summary()["steps"] == 8
    assert Recipe().patience == 3
    assert trained(row.command.replace("patience 1", "patience 0"), *how, steps=48).summary()["steps"] == 16


@page.does("Token accuracy")
def test_token_accuracy(row: Row, trained: Any, runs: Path) -> None:
    run = trained(row.command)
    assert all("accuracy" in e for kind in ("step", "eval") for e in run.metrics(kind))
    assert not any("accuracy" in e for e in Run(runs / "other_run").metrics("step"))
    told = json.loads((runs / "other_run/evaluation/result.json").read_bytes())
    assert "token accuracy" in {m["metric"] for m in told["metrics"]}


@page.does("Manual sample inspection", "Sample 20-30 responses manually")
def test_samples(row: Row, typed: Typed, runs: Path, tmp_path: Path) -> None:
    if "tunesmith" in row.here:
        shutil.rmtree(tmp_path / "my_run/evaluation")
        (tmp_path / "my_run/report.html").unlink()
        found = json.loads(typed(row.command, "--samples", 0, "--max-tokens", 4, "--json").out)
        assert found["answered"] == len(found["samples"]) == 12
        assert found["samples"][0]["prompt"] in (tmp_path / "my_run/report.html").read_text().replace("&#39;", "'")
    told = written(tmp_path / "my_run/evaluation/rows.jsonl")
    assert len(told) == 18 and all({"base", "tuned"} <= set(r) for r in told)


# ---- step 7


@page.does("`python test_emogpt.py`", "`test_prompts = […]`", "Tick: test model with inference script")
def test_smoke(row: Row, typed: Typed, tmp_path: Path) -> None:
    line = row.command if "tunesmith" in row.here else page.rows["`python test_emogpt.py`"].command
    said = typed(line, "--max-tokens", 8, status=1)  # so small a model as my_run's never ends an answer
    assert said.out.count("✓") >= 3 and "✗ answers end by themselves" in said.out
    assert len(re.findall(r"^[✓✗!-] ", said.out, re.M)) == 8
    asked = re.findall(r"^  ask +(.*)", said.out, re.M)
    assert asked == page.block("Step 7: trying it", "text").splitlines() if "prompts" in line else len(asked) == 6
    good = typed("tunesmith test starter --prompts prompts.txt")  # ends with 0
    assert "✗" not in good.out and len((tmp_path / "prompts.txt").read_text().splitlines()) == 4


@page.does("`AutoModelForCausalLM.from_pretrained(MODEL_NAME)`")
def test_the_base_alone(row: Row, typed: Typed, hub: Any) -> None:
    hub(QWEN, STARTER)
    assert typed(row.command).out == typed(row.command.replace(QWEN, "starter")).out != "\n"


@page.does("`torch_dtype=torch.float16`")
def test_bits_of_an_answer(row: Row, runs: Path) -> None:
    assert "leave it out" in row.here and not {"dtype", "torch_dtype"} & set(Recipe.__struct_fields__)
    model = models.to_judge(str(runs / "good"))
    want = methods.half(models.device()) or torch.float32
    assert {p.dtype for p in model.parameters()} == {want}


@page.does("`PeftModel.from_pretrained(model, ADAPTER_PATH)`")
def test_the_adapter_answers(row: Row, typed: Typed, runs: Path) -> None:
    typed(row.command)
    model: Any = models.to_judge(str(runs / "my_run"))
    assert model.peft_config and torch.uint8 in {p.dtype for p in model.parameters()}


@page.does("`test_emogpt.py` in Python")
def test_in_python(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where my_run is
    scope: dict[str, Any] = {}
    exec(page.block("In Python", "python"), scope)
    assert len(scope["outputs"][0]) == scope["inputs"]["input_ids"].shape[1] + 16
    assert scope["model"].active_adapters() and scope["text"].endswith("assistant\n")
    assert capsys.readouterr().out.strip() and "above" in row.here


@page.does(
    "`model.merge_and_unload()`",
    "Merge adapter into base model",
    "Quantize to GGUF for CPU deployment",
    "Ollama (local inference)",
)
def test_exports(row: Row, typed: Typed, tmp_path: Path, tiny: Path) -> None:
    shutil.rmtree(tmp_path / "my_run")
    fit(tmp_path / "my_run", SAMPLE, tiny, method="lora", max_steps=4)
    said = typed(row.command, "--prompts", 2, "--json")
    folder = tmp_path / shlex.split(row.command)[-1]
    certificate = json.loads((folder / "parity.json").read_bytes())
    assert len(certificate["checks"]) >= 5 and not (folder / "NOT-DEPLOYABLE.txt").exists(), said.err
    names = {p.suffix for p in folder.iterdir()}
    assert ".gguf" in names if "gguf" in row.command or "ollama" in row.command else ".safetensors" in names
    assert (folder / "Modelfile").exists() == ("ollama" in row.command)
    assert not (folder / "adapter_config.json").exists()


CHAT = {
    "`tokenizer.apply_chat_template(…, add_generation_prompt=True)`": ' --system "Answer briefly."',
    "`max_new_tokens=256`": " --max-tokens 256",
    "`temperature=0.7`": " --temperature 0.7",
    "`top_p=0.9`": " --top-p 0.9",
    "`do_sample=True`": " --seed 3",
    "`skip_special_tokens=True`": " --json",
    "`User: … Assistant: …`": " --against starter",
    "Emoji spam 2: few-shot examples in the system prompt": ' --system "Q: What is 2 + 2? A: 4."',
}


@page.does(*CHAT)
def test_how_it_answers(row: Row, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the option does to what the model is asked, and how an answer's tokens are chosen."""
    from tunesmith.local.decode import Decoder

    asked: list[Any] = []
    add = Decoder.add
    monkeypatch.setattr(Decoder, "add", lambda self, answer: (asked.append(answer), add(self, answer))[1])
    option = CHAT[row.there]
    more = [] if "--max-tokens" in row.command else ["--max-tokens", 16]
    said = typed(row.command, *more).out
    plain = typed(row.command.replace(option, ""), *more).out
    (one, two) = (asked[0], asked[-1])
    if "--system" in option:
        assert len(one.prompt) > len(two.prompt) and one.prompt[-3:] == two.prompt[-3:]
    elif "--max-tokens" in option:
        typed(row.command.replace("256", "16"))
        assert [a.how.max_tokens for a in asked] == [256, 256, 16] and said == plain
    elif "--top-p" in option:
        assert (one.how.top_p, two.how.top_p) == (0.9, 0.95) and one.how.temperature == 0.7
        assert "over 0, 1 at most" in typed(row.command.replace("0.9", "1.5"), status=2).err
    elif "--temperature" in option:
        assert (one.how.temperature, two.how.temperature) == (0.7, 0.0)
    elif "--seed" in option:
        assert (one.how.seed, two.how.seed, one.how.temperature) == (3, 0, 1.0) and said != plain
        assert typed(row.command, *more).out == said
    elif "--json" in option:
        assert json.loads(said)["answer"] == plain.strip() and "<|im_end|>" not in plain
    else:
        assert "── starter" in said and "── my_run" in said and len(asked) == 3


@page.does(
    "Tick: responses use emojis appropriately",
    "Tick: technical accuracy preserved",
    "Tick: shorter than typical LLM responses",
    "Tick: emojis replace phrases, not technical terms",
    "Tick: evaluate token reduction and quality",
)
def test_ticks_that_are_measured(row: Row, typed: Typed) -> None:
    """The metric is in the table; a good answer passes and a bad one fails, by the same columns."""
    said = once_typed(typed, row.command, "--max-tokens", 8)
    named = re.findall(r"\*([a-z ]+)\*", row.why)
    assert all(re.search(rf"^ *{name} +\d", said.out, re.M) for name in named), named
    if not named:
        assert re.search(r"^verdict: (better|worse|cannot tell)", said.out, re.M) and "token reduction" in said.out
        return
    from tunesmith.conversation import Conversation, Message
    from tunesmith.evaluation.metric import Facts, Heard, Said, measure

    metric = next(m for m in compression.METRICS if m.name == named[0])
    asked = Conversation(
        (Message("user", "How?"), Message("assistant", "Run `pip install torch` 🎉")), {"original_tokens": 40}
    )
    good, bad = "Then run `pip install torch` 🎉", "🎉🎉🎉🎉 Just do the thing that everybody does with the snake " * 4
    found = measure(metric, [asked], [Heard(said=Said(bad))], [Heard(said=Said(good))], Facts())
    assert found
    assert found.tuned > found.base if metric.better == "higher" else found.tuned < found.base


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    service = Hostile()
    service.models, service.answer = {"judge": {}}, lambda body: '{"verdict": "A"}'
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield service
    service.close()


@page.does("Tick: natural and helpful tone", "Measure preference, warmth, helpfulness")
def test_judged(row: Row, typed: Typed, judge: Hostile, tmp_path: Path) -> None:
    said = typed(row.command.replace("http://127.0.0.1:8000/v1", judge.url), "--samples", 0, "--max-tokens", 8).out
    assert "the judge judge:" in said and "it followed the position in 100%" in said
    assert len(written(tmp_path / "my_run/evaluation/judge.jsonl")) > 0
    assert "by loss" in said.partition("verdict:")[2]


# ---- step 8


METRICS = {
    "`(total_original - total_generated) / total_original * 100`": ["token reduction"],
    "Average token reduction against the uncompressed answers": ["token reduction from originals"],
    "Check 1: emoji usage (strategic vs decorative)": ["emoji per answer", "over 5 emoji"],
    "Check 2: technical accuracy": ["technical terms kept"],
    "Check 3: readability and flow": ["self-repetition", "turn coherence"],
    "Token Reduction: 20-30%": ["token reduction from originals"],
    "Why lower than 32.5%?": ["token reduction from originals"],
}


@page.does(*METRICS)
def test_metrics_of_the_evaluation(row: Row, runs: Path) -> None:
    """They are in result.json, and the reduction is what the answers in rows.jsonl give by the guide's formula."""
    told = {m["metric"]: m for m in json.loads((runs / "my_run/evaluation/result.json").read_bytes())["metrics"]}
    page_of_metrics = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    for name in METRICS[row.there]:
        assert f"*{name}*" in row.here and name in told and f"\n| {name} | " in page_of_metrics
        interval = told[name]["low"] is not None and told[name]["low"] <= told[name]["high"]
        assert interval or name == "emoji per answer"
    if "reduction" not in row.there and "Reduction" not in row.there and "total" not in row.there:
        return
    asked = {json.dumps(r["messages"]): r for r in written(runs / "my_run/data/test.jsonl")}
    sums = [0, 0, 0]
    for each, source in zip(written(runs / "my_run/evaluation/rows.jsonl"), asked.values(), strict=True):
        several = sum(m["role"] == "assistant" for m in source["messages"]) > 1
        answer = compression.tokens(each["tuned"]["said"]["text"])
        if METRICS[row.there] == ["token reduction"]:
            sums[0] += compression.tokens(source["messages"][-1]["content"])
            sums[1] += answer
        elif not several:
            sums[0] += source["metadata"]["original_tokens"]
            sums[1] += answer
    assert told[METRICS[row.there][0]]["tuned"] == pytest.approx(100 * (sums[0] - sums[1]) / sums[0])


@page.does('`tiktoken.get_encoding("cl100k_base")`')
def test_encoding(row: Row) -> None:
    assert [compression.tokens(t) for t in ("hello world", "tiktoken is great!")] == [
        2,
        6,
    ]  # as tiktoken's own page says
    assert not list(ROOT.glob("src/**/*.tiktoken")) and "tiktoken" not in (ROOT / "pyproject.toml").read_text()


@page.does("`conv['messages'][:-1]`")
def test_what_is_asked(row: Row, runs: Path) -> None:
    told = json.loads((runs / "my_run/evaluation/result.json").read_bytes())["samples"]
    asked = {
        r["messages"][-2]["content"]: r["messages"][-1]["content"] for r in written(runs / "my_run/data/test.jsonl")
    }
    assert told and all(asked[s["prompt"]] == s["reference"] for s in told)


@page.does("`datasets/emogpt_train_val.jsonl` as test file")
def test_held_out(row: Row, typed: Typed) -> None:
    short = ("--samples", 0, "--max-tokens", 4, "--rows", 2)
    assert "on 24 held-out rows" in typed(row.command, *short).out
    seen = typed("tunesmith evaluate my_run --dataset my_run/data/valid.jsonl", *short, status=None)
    assert seen.code == 3 and ("seen" in seen.err or "trained" in seen.err or "chosen" in seen.err)


@page.does("`max_new_tokens=512`", "`generate(…, temperature=0.7)` without `do_sample`")
def test_how_answers_are_drawn(row: Row, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.local.decode import Decoder

    asked: list[Any] = []

    def add(self: Decoder, answer: Any) -> None:  # nothing is said
        asked.append(answer.how)
        answer.finish = "length"

    monkeypatch.setattr(Decoder, "add", add)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sampled = "--samples" in row.command
    typed(row.command, *(["--max-tokens", 8] if sampled else ["--samples", 0]))
    heats = {how.temperature for how in asked}
    assert heats == ({0.0, 0.8} if sampled else {0.0})
    assert sampled or max(how.max_tokens for how in asked) == 256  # half of what the tiny model's context has


@page.does("Check 4: tone (helpful, warm, professional)")
def test_style(row: Row, typed: Typed) -> None:
    """Absent here, where the base says nothing; told apart are the sample's answers and their long originals."""
    from tunesmith.evaluation.persona import learn_style, style_score

    said = typed(row.command, "--samples", 0, "--max-tokens", 4, "--json").out
    assert json.loads(said)["task"] == "persona" and "style" not in {m["metric"] for m in json.loads(said)["metrics"]}
    pairs = [
        (r["messages"][-1]["content"], r["metadata"]["original"])
        for r in written(SAMPLE)
        if r["metadata"].get("original")
    ]
    weights, accuracy = learn_style([short for short, _ in pairs], [long for _, long in pairs], 0)
    assert accuracy >= 0.7 and len(pairs) > 40
    scores = [(style_score(short, weights), style_score(long, weights)) for short, long in pairs]
    assert sum(short > long for short, long in scores) > 0.8 * len(pairs)


# ---- issues


@page.does("Issue: model not using emojis")
def test_emoji_absent(row: Row, typed: Typed) -> None:
    said = typed(row.command, "--max-tokens", 8).out
    assert "emoji absent" in said and "a higher --lora-rank (16)" in said


POOR = {  # an answer with the symptom
    "Output looks like normal LLM responses, no emojis": "Then run `pip install torch`, and all will be well.",
    "Every sentence has multiple emojis": "Run 🎉😀 `pip install torch` 🎉🎊. And wait 😀😁.",
    "Incoherent responses, repetition, technical errors": "so it is so it is so it is so it is so it is",
}


@page.does(*POOR)
def test_symptoms(row: Row, typed: Typed) -> None:
    """Each is a figure beside the base's, which tells such an answer from a good one."""
    from tunesmith.conversation import Conversation, Message
    from tunesmith.evaluation.metric import Facts, Heard, Said, measure
    from tunesmith.evaluation.tasks import TASKS

    said = once_typed(typed, row.command, "--max-tokens", 8).out
    named = re.findall(r"\*([a-z0-9 -]+)\*", row.why)
    assert named and all(re.search(rf"^ *{name} +-?\d", said, re.M) for name in named), said
    metric = next(m for found in (TASKS["compression"], TASKS["chat"]) for m in found if m.name == named[0])
    asked = Conversation((Message("user", "How?"), Message("assistant", "Run `pip install torch` 🎉")))
    sides = [[Heard(said=Said(text))] for text in (POOR[row.there], "Then run `pip install torch` 🎉")]
    found = measure(metric, [asked], *sides, Facts())
    assert found and metric.better == "lower" and found.tuned < found.base


@page.does("Issue: too many emojis (emoji spam)", "Issue: model degraded (worse than base)")
def test_spam_and_degradation(row: Row, typed: Typed) -> None:
    said = once_typed(typed, row.command).out
    assert "emoji spam" in said and "--max-emoji 5" in said and "of its answers have more than five emoji" in said
    assert re.search(r"^verdict: worse", said, re.M) and "worse than the base" in said and "emoji absent" not in said
    other = once_typed(typed, "tunesmith evaluate other_run --samples 0 --max-tokens 8").out
    assert "emoji spam" not in other and "verdict: worse" not in other


@page.does("Emoji spam 4: filter over-augmented samples (>5 emojis)")
def test_filter(row: Row, typed: Typed, tmp_path: Path) -> None:
    items = written(SAMPLE)
    items[2]["messages"][1]["content"] += "🎉" * 6
    items[4]["messages"][1]["content"] = "A family of two: " + "👩‍👩‍👧‍👦" * 5
    write(tmp_path / "data.jsonl", items)
    assert "1 of 60 rows left out" in typed(row.command).err
    assert len(written(tmp_path / "calm.jsonl")) == 59


@page.does("Degraded 4: check for data quality issues")
def test_marked_rows(row: Row, typed: Typed, tmp_path: Path, runs: Path) -> None:
    findings = json.loads((runs / "my_run/evaluation/result.json").read_bytes())["training_rows"]["findings"]
    marked = [f for f in findings if {"contradicting", "doubtful"} & set(f["codes"])]
    assert marked and all(re.search(r"\.jsonl:\d+$", f["source"]) for f in marked)
    typed(row.command)
    assert len(written(tmp_path / "clean.jsonl")) == 60 - len(marked)


@page.does("Out of memory 1: batch size (4 to 2 or 1)")
def test_parts_of_a_batch(row: Row, trained: Any, typed: Typed) -> None:
    run = trained(row.command)
    assert losses(run) == pytest.approx(losses(trained("tunesmith train --dataset data.jsonl")), rel=1e-4)
    plan = row.command.replace("train", "plan", 1)
    found = (
        json.loads(typed(line, "--no-probe", "--json").out)["memory_mb"] for line in (plan, plan.replace("256", "8192"))
    )
    assert next(found) < next(found)


@page.does("Out of memory 3: gradient checkpointing", "Out of memory 4: smaller model (3B to 1.5B)")
def test_less_memory(row: Row, typed: Typed, true_sizes: None) -> None:
    more = (
        row.command.replace(" --gradient-checkpointing", "")
        if QWEN not in row.command
        else row.command.replace(QWEN, "meta-llama/Llama-3.2-3B-Instruct")
    )
    less, most = (json.loads(typed(line, "--json").out)["memory_mb"] for line in (row.command, more))
    assert less < most


# ---- what to expect, next steps, resources


@page.does("Emoji Appropriateness: 80%+", "Technical Accuracy: 90%+")
def test_own_metrics(row: Row, typed: Typed) -> None:
    said = typed(row.command, "--samples", 0, "--max-tokens", 8).out
    name = "accurate" if "accurate" in row.command else "[🎉✅💻😊]"
    assert re.search(rf"^verdict: .*, by .*{re.escape(name)}", said, re.M)
    scope: dict[str, Any] = {}
    exec(page.block("A metric of your own", "python"), scope)
    assert scope["accurate"]("run `pip`", "Run `pip` 2 times") == 0.5 and scope["accurate"]("a", "b") is None


@page.does("Extract & augment LMSYS conversations")
def test_extracting(row: Row, typed: Typed, tmp_path: Path) -> None:
    answers = ["No emoji.", "\N{THUMBS UP SIGN} one", "\N{THUMBS UP SIGN}" * 6]
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]
    short = [{"conversations": [{**turns[0], "value": text}, {**turns[1], "value": text}]} for text in answers]
    write(tmp_path / "lmsys.jsonl", [*short, {"conversations": turns * 5}])
    typed(row.command)
    assert [r["messages"][1]["content"] for r in written(tmp_path / "lmsys_short.jsonl")] == answers[:2]


@page.does("Add 1500-2500 LMSYS samples")
def test_mixing(row: Row, typed: Typed, tmp_path: Path) -> None:
    lmsys = [
        {"conversations": [{"from": "human", "value": r["prompt"]}, {"from": "gpt", "value": r["completion"]}]}
        for r in rows(40)
    ]
    write(tmp_path / "lmsys.jsonl", lmsys)
    typed(row.command)
    mixed = written(tmp_path / "mixed.jsonl")
    assert len(mixed) == 80 and sum(r["messages"][0]["content"].startswith("Question number") for r in mixed) == 20


@page.does("Reason: small dataset (474 samples)")
def test_few_rows_are_named(row: Row, typed: Typed, tmp_path: Path) -> None:
    for count, code in ((40, "few-rows"), (120, "some-rows"), (474, None)):
        write(tmp_path / "data.jsonl", rows(count))
        found = re.findall(r"\[((?:few|some)-rows)\]", typed(row.command).out)
        assert found == ([code] if code else [])


@page.does("Expand the dataset: 2000-3000 samples, re-train", "Reason: first iteration")
def test_going_on(row: Row, trained: Any, tmp_path: Path, typed: Typed) -> None:
    write(tmp_path / "more.jsonl", rows(40))
    run = trained(row.command)
    assert Path(recipe(run).model) == (tmp_path / "my_run").resolve() and run.state() == "succeeded"
    assert len(json.loads(typed(f"tunesmith runs show {run.path} --json").out)["lineage"]) == 2


@page.does("Mistral-7B-Instruct (upper bound)", "A/B testing with users")
def test_side_by_side(row: Row, typed: Typed, hub: Any, shape: Any) -> None:
    hub("mistralai/Mistral-7B-Instruct-v0.3", shape("mistral"))
    said = typed(row.command, "--max-tokens", 4).out
    other = shlex.split(row.command)[shlex.split(row.command).index("--against") + 1]
    assert "── my_run\n" in said and f"── {other}\n" in said


@page.does("Create API wrapper")
def test_serving(row: Row, tiny: Path, tmp_path: Path) -> None:
    from serving import Server

    shutil.copytree(tiny, tmp_path / "merged")
    words = shlex.split(row.command)
    assert words[:3] == ["tunesmith", "serve", "--allow-model"] and words[4:] == [
        "--port",
        "8000",
    ]  # here: any that is free
    server = Server(tmp_path / "data-dir", "--allow-model", words[3].replace("=", f"={tmp_path}/"))
    try:
        asked: Any = [{"role": "user", "content": "Hi"}]
        answer = server.client().chat.completions.create(model="emogpt", messages=asked, max_completion_tokens=4)
        assert answer.usage and answer.usage.completion_tokens == 4
    finally:
        assert server.stop() == 0


@page.does("HuggingFace PEFT", "TRL", "Unsloth (2x faster training)", "HuggingFace fine-tuning guide")
def test_resources(row: Row, runs: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", row.here + row.why)
    assert all((ROOT / "docs/coming-from" / link).resolve().exists() for link in links)
    if row.there == "HuggingFace PEFT":
        from peft import AutoPeftModelForCausalLM

        assert AutoPeftModelForCausalLM.from_pretrained(runs / "my_run").peft_config["default"].r == 16
    elif row.there == "TRL":
        assert "TRL" in (ROOT / "docs/benchmarks.md").read_text()
        assert "import trl" not in "".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    else:
        assert links


@page.does("QLoRA paper")
def test_the_papers_settings(row: Row, trained: Any) -> None:
    r = recipe(trained(row.command))
    assert (r.quant_type, r.double_quant, r.lora_targets) == ("nf4", True, "all-linear")
    assert (r.lora_rank, r.lora_alpha, r.lora_dropout, r.learning_rate) == (64, 16, 0.1, 2e-4)
    assert (r.lr_scheduler, r.warmup_ratio, r.max_grad_norm, r.batch_size, r.adam_beta2) == (
        "constant",
        0,
        0.3,
        16,
        0.999,
    )


@page.does("HuggingFace Models")
def test_push(row: Row, typed: Typed, tmp_path: Path, tiny: Path) -> None:
    fit(tmp_path / "lora", SAMPLE, tiny, method="lora", max_steps=2)
    typed("tunesmith export lora -o merged --prompts 1")
    said = typed(row.command)
    assert "you/emogpt" in said.out and "model.safetensors" in said.out and "train.jsonl" not in said.out


@page.does("`datapipeline/README.md`, `newplan.md`")
def test_links(row: Row) -> None:
    found = re.findall(r"\]\(([^)#]+)", page.text)
    assert len(found) >= 7 and all((ROOT / "docs/coming-from" / link).resolve().is_file() for link in found)


# ---- the checklist


@page.does("Tick: dataset converted to chat format (train/val split)")
def test_tick_data(row: Row, typed: Typed, tmp_path: Path) -> None:
    typed(row.command)
    assert [len(written(tmp_path / f"prepared/{side}.jsonl")) for side in ("train", "valid", "test")] == [48, 6, 6]
    shutil.rmtree(tmp_path / "prepared")
    write(tmp_path / "data.jsonl", [*written(SAMPLE), {"messages": [{"role": "user", "content": "?"}]}])
    assert "data.jsonl:61" in typed(row.command, status=3).err


@page.does("Tick: dependencies installed", "Tick: GPU available (8GB+ VRAM)")
def test_tick_doctor(row: Row, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    said = typed(row.command).out
    if "--json" in row.command:
        assert (json.loads(said)["gpu"] is None) == (not torch.cuda.is_available())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("T4", (), {"total_memory": 16 * 2**30}))
        assert json.loads(typed(row.command).out)["gpu"] == "Tesla T4, 16 GB"
        return
    assert "ready to train" in said and all(
        name in said for name in ("transformers", "peft", "accelerate", "bitsandbytes")
    )
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "missing: peft" in typed(row.command, status=1).out


@page.does("Tick: model selected")
def test_tick_model(row: Row, typed: Typed, hub: Any, shape: Any) -> None:
    assert "neither a folder here, nor in the cache" in typed(row.command, status=2).err
    hub(QWEN, shape("qwen2"))
    assert QWEN in typed(row.command).out


@page.does("Tick: training script configured")
def test_tick_settings(row: Row, typed: Typed, tmp_path: Path) -> None:
    typed(row.command)
    line = "tunesmith plan --config settings.toml --no-probe"
    assert "48 train" in typed(line).out
    text = (tmp_path / "settings.toml").read_text()
    assert len(re.findall(r"^(?:# ?)?[a-z_0-9]+ =", text, re.M)) >= 60
    (tmp_path / "settings.toml").write_text("num_epoch = 3\n" + text)
    assert 'did you mean "num_epochs"' in typed(line, status=2).err


@page.does("Tick: W&B account created")
def test_tick_tracking(row: Row, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = trained(row.command)
    assert list((run / "logs/mlruns").rglob("train/loss")) and list((run / "logs").glob("events.out*"))


@page.does("Tick: run training (3-6 hours)")
def test_tick_training(row: Row, typed: Typed, tiny: Path, tmp_path: Path) -> None:
    short = ("--model", tiny, "--threads", 1, "--max-steps", 4)
    said = typed(row.command, *short)
    run = Run(tmp_path / said.out.strip())
    assert run.state() == "succeeded" and len(losses(run)) == 4 and "next: tunesmith evaluate" in said.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.LocalBackend, "resume", lambda self, run, step=None: train(run, lambda: True, step))
        stopped = typed(row.command, *short, status=None)
    assert stopped.code == 130 and "after a checkpoint" in stopped.err and "tunesmith train --resume" in stopped.err


@page.does("Tick: iterate based on results")
def test_tick_iterate(row: Row, trained: Any, typed: Typed) -> None:
    assert "chat_data" not in typed(row.command).out
    trained("tunesmith train --dataset data.jsonl")
    assert "chat_data" in typed(row.command).out


def test_every_row_is_done() -> None:
    assert page.undone() == [] and len(page.rows) == 204
    assert all(row.why for row in page.rows.values())
