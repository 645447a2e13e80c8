"""Runs load where users load them: plain transformers, plain peft; the Python interface; the starter itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith as ts
from conftest import ROOT, STARTER
from training import fit

SHARED = ROOT.parent / "shared" / "data"


def test_python_interface(tiny: Path, tmp_path: Path, data: Path) -> None:
    seen: list[str] = []
    run = ts.train(
        data, model=str(tiny), epochs=1, output_dir=str(tmp_path / "run"), on_event=lambda _, e: seen.append(e["type"])
    )
    assert isinstance(run, ts.Run) and run.state() == "succeeded" and "step" in seen and seen[-1] == "state"
    assert ts.evaluate(run, rows=1).rows == 6
    assert ts.plan(data, model=str(tiny), epochs=1).steps == run.summary()["steps"]
    assert len(ts.load(data)) == 60 and not ts.check(data).errors()
    assert len(ts.split(ts.load(data))["train"]) == 48
    assert ts.resume(run).state() == "succeeded"
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        ts.nope  # noqa: B018
    assert set(dir(ts)) == set(ts.__all__)


def test_importing_the_package_loads_nothing() -> None:
    heavy = "('torch', 'transformers', 'msgspec', 'tunesmith.')"
    code = f"import sys, tunesmith; print([m for m in sys.modules if m.startswith({heavy})])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_plain_transformers_loads_a_run(tiny: Path, tmp_path: Path, data: Path) -> None:
    run = fit(tmp_path / "run", data, tiny, epochs=3, learning_rate=1e-2)
    models = {
        name: AutoModelForCausalLM.from_pretrained(place)
        for name, place in (("run", run), ("best", run / "best_model"), ("final", run / "final_model"))
    }
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Question number 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        logits = {name: model(**ids).logits for name, model in models.items()}
    assert torch.equal(logits["run"], logits["best"])
    assert models["run"].generate(**ids, max_new_tokens=3, do_sample=False).shape[1] <= ids["input_ids"].shape[1] + 3
    assert "tunesmith" not in (run / "config.json").read_text()  # nothing of ours is needed to load it


def test_plain_peft_loads_a_lora_run(tmp_path: Path, tiny: Path, data: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    run = fit(tmp_path / "run", data, tiny, method="lora", epochs=2, learning_rate=1e-2)
    for place in (run, run / "best_model", run / "final_model"):
        adapted = AutoPeftModelForCausalLM.from_pretrained(place)
        through_transformers = AutoModelForCausalLM.from_pretrained(place)
        ids = torch.arange(10)[None]
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, through_transformers(ids).logits)
            assert not torch.equal(adapted(ids).logits, AutoModelForCausalLM.from_pretrained(tiny)(ids).logits)
    from tunesmith.local import model as models

    assert hasattr(models.load(run / "best_model"), "peft_config")


def test_starter_is_what_it_says() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(STARTER), AutoTokenizer.from_pretrained(STARTER)
    assert model.config.model_type == "llama" and model.config.max_position_embeddings >= 1024
    assert model.num_parameters() <= 10_000_000
    assert sum(f.stat().st_size for f in STARTER.iterdir()) <= 16 * 2**20
    assert sorted(p.suffix for p in STARTER.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pkl")) == [
        ".safetensors"
    ]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
    assert "{% generation %}" in tokenizer.chat_template
    text = "naïve 🐝👩‍👩‍👧 ǅ 漢字 \u202e\x00\ufffe"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    facts = json.loads((STARTER / "corpus.json").read_text())
    assert "WordNet" in facts["license"] and (STARTER / "README.md").read_text().startswith("---")


# What a right answer calls the thing, or says of it at once: thirty everyday nouns that no training text explains
KINDS = {
    "dog": "animal|pet", "piano": "instrument|music|keys", "apple": "fruit|food", "hammer": "tool", "river": "water|stream",
    "teacher": "person", "bicycle": "vehicle|wheels|rid", "chair": "furniture|seat|sit", "knife": "tool|blade|cut",
    "boat": "vehicle|water|ship|vessel", "bread": "food|flour|baked|dough", "shirt": "clothing|garment|clothes|wear",
    "hospital": "building|place", "cat": "animal|pet", "guitar": "instrument|strings|music", "orange": "fruit",
    "mountain": "hill|land|high|rock|peak", "farmer": "person", "train": "vehicle|rail|cars", "table": "furniture|legs|flat",
    "cup": "container|drink|vessel|dish", "coat": "clothing|garment|clothes|wear", "school": "building|place",
    "lamp": "light", "horse": "animal", "garden": "place|ground|land|plants", "bottle": "container|vessel|glass",
    "lake": "water", "soldier": "person", "clock": "time|instrument|hours|machine",
}  # fmt: skip


def test_starter_answers_held_out_questions() -> None:
    """In grammatical form nearly always; with the right kind of thing more often than not (the model card shows them all)."""
    from tunesmith.conversation import Conversation, Message
    from tunesmith.local.generate import Chat

    held = [json.loads(line)["messages"][0]["content"] for line in (STARTER / "heldout.jsonl").read_text().splitlines()]
    questions = [next(q for q in held if re.fullmatch(rf"What (is|are) (an? )?{w}\?", q)) for w in KINDS]
    answers = Chat("starter")([Conversation((Message("user", q),)) for q in questions], max_tokens=60)
    formed = [a for w, a in zip(KINDS, answers, strict=True) if re.match(rf"(an? )?{w} is .*\.$", a, re.I | re.S)]
    assert len(formed) >= 25 and all(4 <= len(a.split()) <= 50 for a in formed), answers
    right = [
        a
        for w, a in zip(KINDS, answers, strict=True)
        if re.search(KINDS[w], " ".join(a.lower().split()[1:14]).replace(w, ""))
    ]
    assert len(right) >= 14, answers


def test_pretraining_helps(tmp_path: Path) -> None:
    """Echo from the starter against the same shape at random, equal steps: at least a quarter less validation loss."""
    torch.manual_seed(0)
    random_model = tmp_path / "random"
    AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(STARTER).config, dtype=torch.float32
    ).save_pretrained(random_model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (random_model / name).write_bytes((STARTER / name).read_bytes())
    best = {}
    for name, model in (("starter", "starter"), ("random", str(random_model))):
        run = fit(tmp_path / f"run-{name}", "echo", model, max_steps=60, patience=0)
        best[name] = run.summary()["best_valid_loss"]
    assert best["starter"] <= 0.75 * best["random"], best


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data sets lie beside the checkout only where they were provided")
@pytest.mark.parametrize(
    ("name", "extra", "rows"),
    [
        ("gsm8k_test", ["--task", "instruct"], 1319),
        ("humaneval", ["--columns", "prompt=prompt,completion=canonical_solution", "--task", "code"], 164),
    ],
)
def test_real_files_train(name: str, extra: list[str], rows: int, tmp_path: Path) -> None:
    file, command = str(SHARED / f"{name}.jsonl"), [sys.executable, "-m", "tunesmith"]
    words = ["plan", "--dataset", file, "--no-probe", "--json", *extra]
    plan = json.loads(subprocess.check_output([*command, *words], text=True))
    assert sum(plan["rows"].values()) == rows and plan["dropped"] == 0
    short = [
        "--provider",
        "huggingface",
        "--model",
        "starter",
        "--max-steps",
        "2",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "train", "--dataset", file, *short, *extra, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 2, done.stderr
