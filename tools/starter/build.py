"""Rebuild the starter model from its sources: corpus, tokenizer, two stages of pre-training with our own engine.

    python tools/starter/build.py [--work DIR] [--install]

Stage one: dictionary definitions and relations (corpus.py), many passes. Stage two: conversations written for this
project (talk.jsonl, everyday.jsonl) with a share of stage one against forgetting.
Takes a bit over an hour on two cores; interrupted, it goes on where it stopped. --install puts the result in place of
src/tunesmith/assets/starter. Nothing is downloaded but Debian's wordnet-base package.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizer import train as train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import tunesmith as ts
from tunesmith.models import STARTER

HERE = Path(__file__).parent
SEED = 0
COMMON = {
    "test_fraction": 0,
    "persona": "none",
    "batch_size": 32,
    "weight_decay": 0.1,
    "patience": 0,
    "save_steps": 500,
    "seed": SEED,
}
# Stage one stops early, at step 5,000, and goes on from its best, step 3,000: later passes only memorise definitions.
STAGE_ONE = {**COMMON, "epochs": 4, "learning_rate": 2e-3, "warmup_ratio": 0.02, "eval_steps": 1000, "patience": 2}
STAGE_TWO = {**COMMON, "epochs": 1, "learning_rate": 1.5e-3, "warmup_ratio": 0.05, "eval_steps": 200}
HELD_TALK = 100  # conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("starter_build"))
    parser.add_argument("--wordnet", type=Path, help="folder with data.noun and so on, instead of the package")
    parser.add_argument("--install", action="store_true")
    options = parser.parse_args()
    corpus, base, one, two = (options.work / name for name in ("corpus", "base", "one", "two"))
    if not (corpus / "facts.json").exists():
        wordnet = ["--wordnet", str(options.wordnet)] if options.wordnet else []
        subprocess.run([sys.executable, HERE / "corpus.py", "--out", corpus, *wordnet], check=True)
    if not (base / "config.json").exists():
        train_tokenizer(corpus / "train.jsonl", base)
        new_model().save_pretrained(base)
    train(one, corpus / "train.jsonl", corpus / "heldout.jsonl", base, **STAGE_ONE)
    mix(corpus)
    watched = corpus / "talk_heldout.jsonl"
    train(two, corpus / "two.jsonl", watched, one / "best_model", **STAGE_TWO)
    finish(two / "final_model", corpus, options.work / "starter")
    if options.install:
        shutil.copytree(options.work / "starter", STARTER, dirs_exist_ok=True)


def train(run: Path, data: Path, valid: Path, model: Path, **settings: Any) -> None:
    """Train, or go on training."""
    if (run / "run.json").exists():
        ts.resume(run, show)
    else:
        ts.train(data, valid_dataset=str(valid), model=str(model), output_dir=str(run), on_event=show, **settings)


def mix(corpus: Path) -> None:
    """Rows of stage two; a hundred of the conversations are held out to watch it."""
    rng = random.Random(SEED)
    words = "|".join(json.loads((corpus / "facts.json").read_text())["heldout_words"])
    told = re.compile(rf'"completion": "((an?|the) )?({words})s? (is|are) ', re.I)  # what these are, is never told
    talk, everyday = ([r for r in lines(HERE / f"{name}.jsonl") if not told.search(r)] for name in ("talk", "everyday"))
    rng.shuffle(talk)
    held, talk = talk[:HELD_TALK], talk[HELD_TALK:]
    two = talk * 5 + everyday * 3 + rng.sample(lines(corpus / "train.jsonl"), 20_000)
    rng.shuffle(two)
    (corpus / "talk_heldout.jsonl").write_text("".join(held), encoding="utf-8")
    (corpus / "two.jsonl").write_text("".join(two), encoding="utf-8")


def lines(path: Path) -> list[str]:
    return [f"{line}\n" for line in path.read_text(encoding="utf-8").split("\n") if line]


def new_model() -> LlamaForCausalLM:
    """A Llama of 6.5M parameters with random weights: tied embeddings, grouped-query attention."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def show(run: ts.Run, event: dict) -> None:
    if event["type"] == "eval" or (event["type"] == "step" and event["step"] % 100 == 0):
        print({k: event[k] for k in ("type", "step", "loss")}, flush=True)


def finish(model: Path, corpus: Path, target: Path) -> None:
    """The trained model in bfloat16 (13 MB; it is trained and used in float32) with its generation defaults and facts."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model / name, target / name)
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in load_file(model / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((model / "config.json").read_text()), "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    GenerationConfig(eos_token_id=2, pad_token_id=0, max_new_tokens=256).save_pretrained(target)
    shutil.copyfile(corpus / "facts.json", target / "corpus.json")
    shutil.copyfile(corpus / "heldout.jsonl", target / "heldout.jsonl")


if __name__ == "__main__":
    main()
