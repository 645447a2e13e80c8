"""Exports of every shape, through the program that runs them; what each option does; what cannot be exported."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import STARTER, Result, rows, write
from shapes import shaped
from training import fit
from tunesmith import api
from tunesmith.cli import main
from tunesmith.data.write import begun, host
from tunesmith.errors import ModelError, TunesmithError, UsageError
from tunesmith.exporting import forms, gguf_file, merged, parity
from tunesmith.exporting.export import held_out
from tunesmith.exporting.vocabulary import vocabulary
from tunesmith.exporting.weights import Weights
from tunesmith.models import find
from tunesmith.render import Renderer
from tunesmith.runs import Run

ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 2, pieces": ("llama", {"pieces": True}),
    "llama 3, scaled": (
        "llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "yarn": ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "wide heads": ("llama", {"head_dim": 32}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": ("qwen3", {}),
    "mistral, pieces": ("mistral", {"pieces": True, "sliding_window": None}),
    "gemma, pieces": ("gemma", {"pieces": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {}),
    "phi3, long": (
        "phi3",
        {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 256,
                "rope_type": "longrope",
                "long_factor": [1.5] * 8,
                "short_factor": [1.1] * 8,
            },
            "original_max_position_embeddings": 256,  # llama.cpp rounds a context up to a multiple of it
            "max_position_embeddings": 512,
        },
    ),
    "gpt2": ("gpt2", {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_the_same_in_llama_cpp(shape: str, tmp_path: Path) -> None:
    name, changed = SHAPES[shape]
    model = shaped(name, tmp_path / "model", **changed)
    found = forms.export(model, tmp_path / "out", "gguf", prompts=4).certificate
    assert found.deployable, found.failed()
    assert found.runtime.startswith("llama.cpp") and found.probes == 50 and found.prompts == 4
    assert len(found.checks) == 13


def test_every_type_that_facts_know_is_tried() -> None:
    assert {name for name, _ in SHAPES.values()} == set(forms.facts()["models"])


# ---- through the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run of the starter."""
    folder = tmp_path_factory.mktemp("export")
    return fit(folder / "my_run", write(folder / "d.jsonl", rows(60)), "starter", max_steps=6)


@pytest.mark.parametrize("form", ["merged", "gguf", "ollama", "vllm"])
def test_the_command(form: str, run: Run, tmp_path: Path, cli: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    done = cli(
        "export",
        run,
        "--format",
        form,
        "-o",
        out,
        "--prompts",
        4,
        "--license",
        "mit",
        "--data-license",
        "cc0-1.0",
        "--json",
    )
    assert done.code == 0, done.err
    told = done.json()
    assert told["certificate"]["deployable"] and told["path"] == str(out) and Path(told["model"]).exists()
    assert told["certificate"] == json.loads((out / "parity.json").read_text())
    readme = (out / "README.md").read_text()
    assert (
        'license: "mit"' in readme
        and "| licence of the data | cc0-1.0 |" in readme
        and "certificate | passed" in readme
    )
    info = json.loads((out / "model_info.json").read_text())
    assert info["training_examples"] == 48 and info["export"]["form"] == form and info["data_hashes"]["train"]
    wanted = {
        "merged": "tunesmith chat",
        "gguf": "llama-server -m",
        "ollama": "ollama create my_run",
        "vllm": "vllm serve",
    }
    assert told["command"].startswith(wanted[form])
    assert run.last("export")["form"] == form and run.last("export")["deployable"]
    assert not list(tmp_path.glob("*.tmp")) and not (out / "NOT-DEPLOYABLE.txt").exists()
    again = cli("export", "--model-path", run, "--format", form, "--output-dir", out)
    assert again.code == 2 and "the output directory is not empty" in again.err


def test_mistakes_are_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in (
        ([], "one model is exported"),
        ([run, "--model-path", run], "one model is exported"),
        ([run], "where to?"),
        ([run, "-o", "o", "--format", "ggfu"], 'no format "ggfu" (did you mean "gguf"?)'),
        ([run, "-o", "o", "--format", "gguf", "--quantize", "q8"], 'no quantisation "q8"'),
        ([run, "-o", "o", "--format", "gguf", "--quantize", "q4_k_m"], "llama-quantize, which is not on the PATH"),
        ([run, "-o", "o", "--quantize", "q8_0"], 'a model folder is not written as "q8_0"'),
        ([run, "-o", "o", "--format", "adapter"], "the model has no adapter"),
        ([run, "-o", "o", "--unmerged"], "only vLLM serves an adapter beside its base"),
        ([run, "-o", "o", "--format", "vllm", "--unmerged"], "the model has no adapter"),
        (["nowhere/at/all", "-o", "o"], "no such model folder"),
    ):
        assert main(["export", *map(str, given)]) == 2, given
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
        assert not (tmp_path / "o").exists()
    assert main(["parity", str(tmp_path)]) == 2 and "not an export" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, form, extra in (
        ("xllamacpp", "ollama", "gguf"),
        ("gguf", "gguf", "gguf"),
        ("torch", "merged", "local"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(forms, "find_spec", lambda name, package=package: None if name == package else object())
            with pytest.raises(UsageError, match=rf"{form} needs {package} -- pip install 'tunesmith\[{extra}\]'"):
                forms.export(run, tmp_path / "out", form)


def test_an_export_is_certified_again(run: Run, tmp_path: Path, cli: Callable[..., Result]) -> None:
    forms.export(run, tmp_path / "out", prompts=4)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "out", moved)
    done = cli("parity", moved, "--prompts", 2, "--json")
    assert done.code == 0 and done.json()["prompts"] == 2
    other = shaped("llama", tmp_path / "other")
    done = cli("parity", moved, "--against", other)
    assert done.code == 1 and "certificate: not deployable" in done.out and (moved / "NOT-DEPLOYABLE.txt").exists()
    assert cli("parity", moved).code == 1  # it was certified against the other one, and says so
    assert cli("parity", moved, "--against", run).code == 0 and not (moved / "NOT-DEPLOYABLE.txt").exists()


# ---- quantisation


@pytest.mark.parametrize("quantize", ["f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_the_starter_passes_in_every_type(quantize: str, run: Run, tmp_path: Path) -> None:
    done = forms.export(run, tmp_path / "out", "gguf", quantize, prompts=8)
    assert done.certificate.deployable, done.certificate.failed()
    drift = next(c for c in done.certificate.checks if c.name == "log-probabilities").value
    assert drift is not None and 0 < drift < parity.limits(quantize)["drift"]
    bits = {"f32": 32, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}[quantize]
    layers, embedding = 4_427_008, 8192 * 256  # numbers; embedding and head are kept in 8 bits at least
    wanted = (layers * bits + embedding * max(bits, 8.5)) / 8
    assert abs(Path(done.model).stat().st_size - wanted) < 0.05 * wanted + 400_000  # and the vocabulary


def test_a_k_quant_is_made_by_llama_cpps_own_program(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it keeps the 16 bits: what is asked of it and what becomes of its file is ours."""
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$3" > {tmp_path}/asked; [ "$3" = Q3_K_S ] && {{ echo no memory >&2; exit 3; }}\ncp "$1" "$2"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    done = forms.export(run, tmp_path / "out", "gguf", "q4_k_m", prompts=2)
    assert done.certificate.deployable and done.certificate.quantize == "q4_k_m"
    assert Path(done.model).name == "my_run-q4_k_m.gguf" and Path(done.model).exists()
    assert (tmp_path / "asked").read_text() == "Q4_K_M\n"
    assert not list((tmp_path / "out").glob("*f16*"))
    with pytest.raises(TunesmithError, match="llama-quantize failed: no memory"):
        forms.export(run, tmp_path / "other", "gguf", "q3_k_s")
    assert not (tmp_path / "other").exists()


def test_numbers_that_16_bits_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = shaped("llama", tmp_path / "model")
    known = load_file(model / "model.safetensors")
    known["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000.0
    save_file(known, model / "model.safetensors", metadata={"format": "pt"})
    for form in ("merged", "gguf"):
        with pytest.raises(ModelError, match=r"numbers that F16 cannot hold -- export with --quantize bf16"):
            forms.export(model, tmp_path / "out", form, "f16")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))
    assert forms.export(model, tmp_path / "out", "gguf", "bf16", prompts=2).certificate.deployable


# ---- what llama.cpp does not compute


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "opt"}, "GGUF: no model of the type opt"),
        ({"hidden_act": "relu"}, "llama.cpp computes no llama with activation relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "with rope scaling dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
            "yarn positions with beta_fast",
        ),
        (
            {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "mscale": 0.7}},
            "yarn positions with mscale 0.7",
        ),
        (
            {
                "model_type": "phi3",
                "rope_parameters": {
                    **ROPE,
                    "rope_type": "longrope",
                    "long_factor": [1.0],
                    "short_factor": [1.0],
                    "attention_factor": 1.2,
                },
            },
            "longrope positions with attention_factor 1.2",
        ),
        (
            {
                "model_type": "gemma2",
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": 256,
                "head_dim": 16,
            },
            "query_pre_attn_scalar 256",
        ),
    ],
)
def test_a_model_that_it_would_compute_otherwise_is_refused(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = json.loads((STARTER / "config.json").read_text()) | changed
    with pytest.raises(ModelError, match=words):
        gguf_file.model_facts(config, tmp_path)


@pytest.mark.parametrize(
    ("changed", "context"),
    [
        ({"model_type": "mistral", "sliding_window": 600}, 600),
        ({"model_type": "mistral", "sliding_window": None}, 2048),
        ({"model_type": "qwen2", "sliding_window": 600, "use_sliding_window": False}, 2048),
        ({"model_type": "qwen2", "sliding_window": 600, "use_sliding_window": True}, 600),
        (
            {
                "model_type": "phi3",
                "rope_parameters": {**ROPE, "rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
            },
            64,
        ),
    ],
)
def test_a_context_ends_where_it_would_compute_otherwise(changed: dict[str, Any], context: int, tmp_path: Path) -> None:
    config = json.loads((STARTER / "config.json").read_text()) | changed
    known = gguf_file.model_facts(config, tmp_path)
    found = gguf_file.settings(config, known)
    assert found[f"{known['arch']}.context_length"] == context
    assert not [key for key in found if "sliding_window" in key]


def test_a_tokenizer_that_it_lacks_is_refused(tmp_path: Path) -> None:
    model = shaped("llama", tmp_path / "model")
    known = json.loads((model / "tokenizer.json").read_text())
    known["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    (model / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(ModelError, match=r"llama.cpp has no pre-tokenizer of .*w"):
        vocabulary(Renderer(model), 8192, forms.facts()["pretokenizers"])
    with pytest.raises(ModelError, match="its tokenizer knows 8192 tokens, its embedding 100"):
        vocabulary(Renderer(find("starter")), 100, forms.facts()["pretokenizers"])


# ---- merging


def adapters(tmp_path: Path, kind: str, base: Path, **changed: Any) -> Path:
    """An adapter with random weights, as peft saves it."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=base.name == "gpt2",
        **changed,
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.1)
    model.save_pretrained(tmp_path / kind)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / file, tmp_path / kind / file)
    return tmp_path / kind


MERGED: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "llama's patterns": {"alpha_pattern": {"up_proj": 4}, "rank_pattern": {"up_proj": 2}},
    "gpt2's patterns": {"alpha_pattern": {"c_fc": 4}, "rank_pattern": {"c_fc": 2}},
}


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_merging_is_what_peft_does(base: str, kind: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    other = {"llama": "gpt2", "gpt2": "llama"}[base]
    changed = {} if kind.startswith(other) else MERGED[kind]  # patterns of layers that it has
    folder = adapters(tmp_path, "adapter", shaped(base, tmp_path / base), **changed)
    want = AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().state_dict()
    ours = Weights(folder)
    assert len(ours.changed()) == (21 if base == "llama" else 12)
    for name, tensor in ours:
        torch.testing.assert_close(tensor.float(), want[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    folder = adapters(tmp_path, "adapter", shaped("llama", tmp_path / "base"))
    config = json.loads((folder / "adapter_config.json").read_text())
    for changed, words in (
        ({"peft_type": "IA3"}, r"cannot be merged \(IA3"),
        ({"bias": "all"}, "bias all"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ModelError, match=words):
            Weights(folder)
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(shaped("gpt2", tmp_path / "gpt2"))})
    )
    with pytest.raises(ModelError, match="is not in the base"):
        Weights(folder)


def test_what_an_adapter_holds_besides_is_not_lost_in_silence(tmp_path: Path) -> None:
    folder = adapters(tmp_path, "adapter", shaped("llama", tmp_path / "llama"), modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"an adapter with other weights cannot be merged \(base_model.model.lm_head"):
        Weights(folder)


def test_names_are_words_of_a_shell_and_paths_are_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "My run;touch PWNED"
    shutil.copytree(run.path, named)
    monkeypatch.chdir(tmp_path)
    done = forms.export(named.name, "out", "ollama", prompts=2)
    assert done.command.startswith("ollama create my-run-touch-pwned -f ") and done.command.endswith(
        "my-run-touch-pwned"
    )
    assert Path(done.model).name == "My-run-touch-PWNED-f16.gguf" and done.certificate.model == str(
        named / "best_model"
    )
    monkeypatch.chdir("/")
    assert forms.parity(tmp_path / "out", prompts=2).deployable
    (tmp_path / "out" / "Modelfile").unlink()
    assert "Modelfile is missing" in next(c.cause for c in forms.parity(tmp_path / "out", prompts=2).failed())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Not deployable.**" in card and "certificate | failed" in card


def test_shards_are_as_large_as_they_may_be_and_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = shaped("llama", tmp_path / "model")
    weights, out = Weights(model), tmp_path / "out"
    out.mkdir()
    told: list[int] = []
    merged.write_merged(weights, Renderer(model), out, torch.bfloat16, told.append, shard=1_200_000)
    files = sorted(out.glob("*.safetensors"))
    assert [f.name for f in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    assert all(f.stat().st_size < 1_210_000 for f in files) and sum(told) == merged.size(weights)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights.shapes) and index["metadata"]["total_size"] == merged.size(weights)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in weights)


# ---- prompts of the certificate


def test_prompts_are_held_out_rows_first(run: Run) -> None:
    test, valid = ([r.prompt() for r in api.load(run / "data" / f"{side}.jsonl")] for side in ("test", "valid"))
    assert len(test) == len(valid) == 6
    found = held_out(run, 16)
    assert found[:12] == test + valid and [m[0].content for m in found[12:]] == parity.probes()[1][:4]
    assert len(held_out(run, 4)) == 4 and set(held_out(run, 4)) <= set(test)
    assert [m[0].content for m in held_out(None, 3)] == parity.probes()[1][:3]
    assert math.isclose(parity.limits("q4_k_m")["drift"], parity.facts()["limits"]["k_quant"]["drift"])


def test_a_target_that_is_taken_or_a_form_that_is_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for where, words in (
        (tmp_path, "not empty"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/in", "is a file"),
    ):
        with pytest.raises(UsageError, match=words):
            forms.export(run, where)


def test_a_target_that_another_process_makes(run: Run, tmp_path: Path) -> None:
    """Told at once, and not after an hour at the last rename; what a kill on another host, or of this very number, has left is
    removed."""
    for left in (begun(tmp_path / "out"), tmp_path / "out.another-1.tmp"):
        left.mkdir()
        os.utime(left, (0, 0))
    lock = os.open(left, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="process 1 is exporting to it"):
        forms.export(run, tmp_path / "out", prompts=1)
    other = (
        tmp_path / f"mine.{host()}-{2**22 + 1}.tmp"
    )  # of another target, at work in a container: never ours to delete
    other.mkdir()
    os.close(lock)
    forms.export(run, tmp_path / "out", prompts=1)
    assert other.exists() and [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]


def test_a_checkpoint_is_exported_beside_its_optimizer(run: Run, tmp_path: Path) -> None:
    last = sorted((run / "checkpoints").iterdir())[-1]
    assert (last / "optimizer.safetensors").exists()
    done = forms.export(last, tmp_path / "out", prompts=1)
    info = json.loads((tmp_path / "out/model_info.json").read_text())
    assert done.certificate.deployable and info["fine_tuned_model"] == str(last.resolve())


def test_a_full_disk_says_where(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tunesmith.exporting.merged.write_merged", full)
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 1
    assert f"error: {tmp_path / 'out'}: No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("shape", "tied"), [("gemma", True), ("gpt2", True), ("llama", False)])
def test_a_head_is_tied_as_its_class_has_it_where_nothing_is_said(shape: str, tied: bool, tmp_path: Path) -> None:
    folder = shaped(shape, tmp_path / shape)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    done = forms.export(folder, tmp_path / "out", prompts=1)
    head = next(check for check in done.certificate.checks if check.name == "head")
    assert done.certificate.deployable and head.found == ("is the embedding" if tied else "a head of its own")
    said = json.loads((tmp_path / "out" / "config.json").read_text()) | {"tie_word_embeddings": not tied}
    (tmp_path / "out" / "config.json").write_text(json.dumps(said))
    again = forms.parity(tmp_path / "out", prompts=1)
    cause = next(check for check in again.failed() if check.name == "head").cause
    assert cause.startswith("a tied head is not tied" if tied else "a head of its own is tied")


# ---- kills


def test_a_killed_export_leaves_nothing_that_looks_whole(run: Run, tmp_path: Path) -> None:
    """Killed at moments over all of its work; the next try succeeds and clears what was left."""
    out = tmp_path / "exports" / "out"
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "export",
        str(run),
        "--format",
        "gguf",
        "-o",
        str(out),
        "--prompts",
        "2",
    ]
    seen = set()
    for moment in ("begun", "written", "asked"):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for(out, moment, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
        seen |= {part.name for part in out.parent.glob("out.*.tmp")}
        assert not list(out.parent.rglob("parity.json"))
    assert len(seen) >= 3
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.parent.iterdir()] == ["out"] and (out / "parity.json").exists()


def reached(out: Path, moment: str) -> bool:
    """Whether an export is so far: its folder is there, its file is whole, the runtime has it open."""
    files = list(out.parent.glob("out.*.tmp/*.gguf"))
    if moment == "begun":
        return bool(files)
    whole = bool(files) and files[0].stat().st_size > 13_300_000
    return whole and (moment == "written" or serving(str(files[0])))


def serving(file: str) -> bool:
    commands = (p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.exists())
    return any(b"tunesmith.exporting.llamacpp" in c and file.encode() in c for c in commands)


def wait_for(out: Path, moment: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not reached(out, moment):
        assert process.poll() is None and time.monotonic() < end, moment
        time.sleep(0.01)
