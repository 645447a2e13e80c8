"""Shared by all tests: a tiny model, sample rows, the command line as a subprocess. Everything offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The first draw of text builds a table of Unicode and takes seconds: no fault of a test
settings.register_profile("tunesmith", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("tunesmith")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="true")
os.environ["OMP_NUM_THREADS"] = (
    "1"  # tests run side by side: threads of two trainings that wait for each other stand still
)

ROOT = Path(__file__).parent.parent
STARTER = ROOT / "src" / "tunesmith" / "assets" / "starter"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.3M random weights, two layers, with the starter's tokenizer and template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STARTER / name, folder / name)
    return folder


def rows(count: int, words: int = 6) -> list[dict[str, str]]:
    """Distinct prompt and completion rows of differing lengths."""
    return [
        {"prompt": f"Question number {i}?", "completion": " ".join(f"word{i}" for _ in range(1 + i % words)) + "."}
        for i in range(count)
    ]


def write(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is kept between runs is of one test alone, and so is what the processor was told (`local.machine.tune`)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield tmp_path / "cache" / "tunesmith"
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)  # hypothesis draws subnormal numbers, and refuses to without


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 good rows in a JSONL file."""
    return write(tmp_path / "data.jsonl", rows(60))


class Result:
    """What a command did: `code`, `out`, `err`."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Result]:
    """Run `tunesmith ARGS` in tmp_path; fails on a traceback, whatever the exit status."""

    def run(*arguments: object, stdin: str | None = None) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", *map(str, arguments)],
            cwd=tmp_path,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        return Result(done)

    return run


# ---- serving


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for all tests of a worker of the suite, on the tiny model and the starter."""
    from serving import Server

    made = Server(tmp_path_factory.mktemp("serve") / "data", "--allow-model", f"tiny={tiny}", "--max-jobs", 2)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def strict(server: Any) -> Any:
    """The SDK, refusing every response that is not exactly as its types say."""
    return server.client(_strict_response_validation=True)


@pytest.fixture(scope="session")
def tuned(server: Any) -> dict[str, Any]:
    """A job that has ended well, of 24 rows and 3 epochs, with validation."""
    from serving import chats

    train, valid = (server.upload(chats(n, first)).json()["id"] for n, first in ((24, 0), (10, 100)))
    hyper = {"n_epochs": 3, "batch_size": 4}
    order = {"model": "tiny", "training_file": train, "validation_file": valid, "suffix": "My_Suffix", "seed": 5}
    order |= {"method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}, "metadata": {"run": "a b"}}
    made = server.ask("POST", "/fine_tuning/jobs", order)
    assert made.status == 200, made.body
    found = server.job(made.json()["id"])
    assert found["status"] == "succeeded", found
    return found
