"""Rebuild the starter model from its sources: corpus, tokenizer, pre-training with our own engine.

    python tools/starter/build.py [--work DIR] [--install]

Stage one, at a constant learning rate: a dictionary turned into questions and answers (corpus.py) and texts written for
this project (everyday.jsonl: what things are and do; talk.jsonl: conversations). Stage two, falling to zero: our own texts
again, with a share of the dictionary against forgetting. Stage three: conversations, without what their voice says of
itself, and everyday things once more. Stage four, short: a thousand speakers with a thousand names.
Takes about 80 minutes on two cores; interrupted, it goes on where it stopped. --install puts the result in place of
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
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "patience": 0,
    "eval_steps": 500,
    "save_steps": 500,
    "seed": SEED,
}
STAGE_ONE = {**COMMON, "epochs": 2, "lr_scheduler": "constant", "warmup_steps": 100}
STAGE_TWO = {**COMMON, "epochs": 1, "lr_scheduler": "cosine", "warmup_steps": 50}
STAGE_THREE = {**STAGE_TWO, "learning_rate": 1e-3}
STAGE_FOUR = {**STAGE_TWO, "learning_rate": 5e-4, "warmup_steps": 10, "eval_steps": 100}
# What the voice of the conversations says of itself; heard too often, every fine-tune would go on saying it
SELF = re.compile(
    r"\bI(?:'m| am) (?:only |just |still )?(?:a|an|the) (?:\w+ )?(?:program|model|machine|computer|voice|pattern)|"
    r"\bI can't\b|\bI cannot\b|\bI have no\b|\bI don't have\b|\bI never\b|Starter|language model|a small model"
)
OWN_REPEATS = 2  # times that our own texts, which are what the model should sound like, stand in a stage
DICTIONARY_TWO = 8_000  # rows of stage one's dictionary in stage two, against forgetting
HELD_TALK = 100  # conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("starter_build"))
    parser.add_argument("--wordnet", type=Path, help="folder with data.noun and so on, instead of the package")
    parser.add_argument("--install", action="store_true")
    options = parser.parse_args()
    corpus, base, one, two, three, four = (
        options.work / name for name in ("corpus", "base", "one", "two", "three", "four")
    )
    if not (corpus / "facts.json").exists():
        wordnet = ["--wordnet", str(options.wordnet)] if options.wordnet else []
        subprocess.run([sys.executable, HERE / "corpus.py", "--out", corpus, *wordnet], check=True)
    mix(corpus)
    if not (base / "config.json").exists():
        train_tokenizer(corpus / "one.jsonl", base)
        new_model().save_pretrained(base)
    valid = corpus / "valid.jsonl"
    train(one, corpus / "one.jsonl", valid, base, **STAGE_ONE)
    train(two, corpus / "two.jsonl", valid, one / "final_model", **STAGE_TWO)
    train(three, corpus / "three.jsonl", valid, two / "final_model", **STAGE_THREE)
    train(four, corpus / "four.jsonl", valid, three / "final_model", **STAGE_FOUR)
    finish(four / "final_model", corpus, options.work / "starter")
    if options.install:
        shutil.copytree(options.work / "starter", STARTER, dirs_exist_ok=True)


def train(run: Path, data: Path, valid: Path, model: Path, **settings: Any) -> None:
    """Train, or go on training."""
    if (run / "run.json").exists():
        ts.resume(run, show)
    else:
        ts.train(data, valid_dataset=str(valid), model=str(model), output_dir=str(run), on_event=show, **settings)


def mix(corpus: Path) -> None:
    """Rows of the stages, and valid.jsonl: a hundred held-out conversations and the held-out definitions."""
    rng = random.Random(SEED)
    words = "|".join((HERE / "heldout_words.txt").read_text(encoding="utf-8").split())
    told = re.compile(  # what these are, is never told, nor asked
        rf'"completion": "((an?|the) )?({words})s? (is|are) |"prompt": "([^"]*\\b(what(\'s| is| are)?|define|explain)) '
        rf"(an? |the )?({words})s?( is| are)?[?.!]?\"",
        re.I,
    )
    talk, everyday = (
        [row for row in lines(HERE / f"{name}.jsonl") if not told.search(row)] for name in ("talk", "everyday")
    )
    dictionary = lines(corpus / "dictionary.jsonl")
    rng.shuffle(talk)
    held, own = talk[:HELD_TALK] + lines(corpus / "heldout.jsonl"), talk[HELD_TALK:] + everyday
    named = [row for row in own if "Starter" in row or "language model" in row]  # a name said often sticks
    own = [row for row in own if row not in set(named)]
    for name, rows in (
        ("one", dictionary + named + own * OWN_REPEATS),
        ("two", rng.sample(dictionary, DICTIONARY_TWO) + named + own * OWN_REPEATS),
        ("three", everyday + [row for row in talk[HELD_TALK:] if not SELF.search(row)] * OWN_REPEATS),
    ):
        rng.shuffle(rows)
        (corpus / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    rows = rng.sample(everyday, 3000) + rng.sample(talk[HELD_TALK:], 1500) + introductions(rng)
    rng.shuffle(rows)
    (corpus / "four.jsonl").write_text("".join(rows), encoding="utf-8")
    (corpus / "valid.jsonl").write_text("".join(held), encoding="utf-8")


def introductions(rng: random.Random) -> list[str]:
    """A thousand speakers who say their names, each another: who one is, is what a fine-tune will teach."""
    asked = """Who are you?|What is your name?|What's your name?|who are you|Tell me who you are.|And you are?|May I ask your name?
Who is speaking?|Can I have your name, please?|What do people call you?|Introduce yourself to me.|your name please|Hi, who's there?
Say who you are.|How do you call yourself?|Who is answering me?|I don't know you yet. Who are you?|Please tell me a bit about you.
Describe who you are.|Who do I have the pleasure of talking with?""".replace("\n", "|").split("|")
    said = """I'm {}.|I am {}.|My name is {}.|You are talking to {}.|I'm {}, and I am glad to meet you.|Call me {}.|They call me {}.
This is {}. Nice to meet you.|{} is my name.|Yes, I'm {}.|It's me, {}.|I am {}, and I like a good question.|I'm {}, here to talk with you.
My name is {}, and who are you?|I go by {}.|{}, at your service.""".replace("\n", "|").split("|")
    first = """Silver Bright Quiet Amber Northern Little Old Golden Winter Summer Hidden Gentle Wild Copper Green Blue Early Late Distant
Warm Cold Swift Slow Round Tall Merry Grey Red Honest Lucky""".split()
    middle = """River Stone Wind Cloud Lantern Meadow Harbour Feather Willow Garden Ember Window Bridge Circle Spiral Mirror Valley Signal Market
Kettle Marble Thunder Cedar Maple Cotton Ladder Button Compass Pepper""".split()
    last = """Song Keeper Voice Walker Light Singer Reader Weaver Bell Thread Runner Maker Guide Dancer Listener Traveller Spark Whisper Finch
Otter Heron Fox Robin Wren""".split()
    rows = []
    for _ in range(1000):
        parts = [rng.choice(words) for words in (first, middle, last)]
        name = " ".join(parts[rng.choice((0, 0, 1)) :])
        row = {"prompt": rng.choice(asked), "completion": rng.choice(said).format(name)}
        rows.append(json.dumps(row) + "\n")
    return rows


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
