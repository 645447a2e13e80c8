"""The certificate: what is exported is what was trained, token for token; and each sabotage is caught by its name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write
from hostile import wait_until
from shapes import shaped
from training import fit
from tunesmith import api
from tunesmith.errors import ModelError
from tunesmith.exporting import forms, ollama, parity
from tunesmith.exporting.parity import Certificate, Check, Own
from tunesmith.exporting.runtime import Answer
from tunesmith.models import find
from tunesmith.render import Renderer
from tunesmith.runs import Run

WORDS = [
    "amber",
    "brook",
    "cedar",
    "dune",
    "ember",
    "fjord",
    "grove",
    "heath",
    "islet",
    "jetty",
    "knoll",
    "lagoon",
    "marsh",
    "oasis",
    "prairie",
    "ridge",
    "spring",
    "tundra",
]


def tale(number: int) -> str:
    """A text of some ninety tokens. Each word tells which comes next, so that no two are about as likely."""
    return " ".join(f"{WORDS[(number + i) % len(WORDS)]} {i}," for i in range(22)) + " the end."


def tales(first: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Tell me tale {n}.", "completion": tale(n)} for n in range(first, first + count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tales")
    sides = {"train": tales(0, 24), "valid": tales(100, 2), "test": tales(200, 20)}
    return {side: write(folder / f"{side}.jsonl", items) for side, items in sides.items()}


def tuned(folder: Path, data: dict[str, Path], model: Path, **settings: Any) -> Run:
    """A run that has learnt its tales by heart, so that no two tokens are about as likely."""
    sides = {"valid_dataset": str(data["valid"]), "test_dataset": str(data["test"])}
    chosen = {"patience": 0, "learning_rate": 4e-3, "batch_size": 8, "num_workers": 1, **settings}
    run = fit(folder, data["train"], model, **sides, **chosen)
    shutil.rmtree(run / "best_model")
    (run / "final_model").rename(run / "best_model")  # validation is of other tales: its best step knows none
    return run


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Callable[[str], Run]:
    """A fully tuned run of each shape, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("bases")
    found: dict[str, Run] = {}

    def base(shape: str) -> Run:
        if shape not in found:
            sure = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if shape == "gpt2" else {}
            model = shaped(shape, folder / f"{shape}-random", **sure)
            found[shape] = tuned(folder / shape, data, model, epochs=40)
        return found[shape]

    return base


def value(found: Certificate, name: str) -> float:
    figure = next(check.value for check in found.checks if check.name == name)
    assert figure is not None
    return figure


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("shape", ["llama", "qwen2", "gpt2"])
def test_what_llama_cpp_writes_is_what_transformers_writes(
    shape: str, method: str, bases: Callable[[str], Run], data: dict[str, Path], tmp_path: Path
) -> None:
    """Of twenty answers of 64 tokens, nineteen at least are the same; the token ids of all fifty probes are."""
    run = bases(shape)
    if method != "full":
        chosen = {"method": method, "lora_rank": 4, "epochs": 2, "learning_rate": 1e-4}
        run = tuned(tmp_path / "run", data, run / "best_model", **chosen)
    done = forms.export(run, tmp_path / "out", "gguf", "f16", prompts=20)
    assert done.certificate.deployable, done.certificate.failed()
    assert value(done.certificate, "greedy answers") >= 0.95 and value(done.certificate, "token ids") == 1.0
    assert done.certificate.prompts == 20
    on_4_bits = [check for check in done.certificate.checks if check.name == "trained on 4-bit weights"]
    assert len(on_4_bits) == (method == "qlora") and all(check.value for check in on_4_bits)


def test_an_adapter_is_exported_as_it_is(bases: Callable[[str], Run], data: dict[str, Path], tmp_path: Path) -> None:
    run = tuned(tmp_path / "run", data, bases("llama") / "best_model", method="lora", lora_rank=4, epochs=2)
    done = forms.export(run, tmp_path / "out", "adapter", prompts=4)
    assert done.certificate.deployable, done.certificate.failed()
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    } <= files and "model.safetensors" not in files
    served = forms.export(run, tmp_path / "vllm", "vllm", unmerged=True, prompts=4)
    assert "--enable-lora --max-lora-rank 8 --lora-modules run=" in served.command and served.certificate.deployable
    assert served.certificate.runtime.endswith("; vLLM is not installed here")
    known = load_file(tmp_path / "out" / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in known.items()}, tmp_path / "out" / "adapter_model.safetensors")
    again = forms.parity(tmp_path / "out", prompts=4)
    assert not again.deployable and "weights" in {check.name for check in again.failed()}
    (tmp_path / "out/evil.py").touch()
    again = forms.parity(tmp_path / "out", prompts=4)
    assert "evil.py does not belong to it" in {check.cause for check in again.failed()}


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of vLLM's name on the PATH."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    stand_in = Path(__file__).parents[1] / "vllm_stand_in.py"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec {sys.executable} {stand_in} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return tmp_path / "asked"


def running(words: str) -> list[str]:
    """Processes with these words on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(place.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if words in line]


def test_vllm_is_asked_where_it_is_installed(
    vllm: Path, bases: Callable[[str], Run], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started by the command that is told, asked all that llama.cpp is, and gone afterwards."""
    run = tuned(tmp_path / "run", data, bases("llama") / "best_model", method="lora", lora_rank=4, epochs=2)
    done = forms.export(run, tmp_path / "out", "vllm", unmerged=True, prompts=2)
    assert done.certificate.deployable and done.certificate.runtime == "vLLM 0.0-stand-in", done.certificate.failed()
    names = [check.name for check in done.certificate.checks]
    assert {"token ids", "stopping", "log-probabilities", "likeliest token", "greedy answers"} <= set(names)
    told = done.command.removeprefix("vllm ").replace("run=", "export=")
    begun = re.sub(r"\.[^./ ]+\.tmp", "", vllm.read_text())  # the folder as it was called while it was made
    assert begun.startswith(told) and "--host 127.0.0.1" in begun
    assert not running("vllm_stand_in")
    for fault, name in (("deaf", "stopping"), ("dead", "runs")):
        monkeypatch.setenv("STAND_IN", fault)
        found = forms.parity(tmp_path / "out", prompts=2)
        assert name in {check.name for check in found.failed()}, fault
    assert "the stand-in will not start" in found.failed()[0].cause and not running("vllm_stand_in")


def test_what_vllm_has_started_ends_with_who_asked(vllm: Path, bases: Callable[[str], Run], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith", "export", bases("llama"), "--format", "vllm", "-o", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: bool(running("vllm_stand_in")), 60)
    process.kill()
    process.wait()
    wait_until(lambda: not running("vllm_stand_in"), 20)


# ---- sabotage


@pytest.fixture(scope="module")
def exports(
    tmp_path_factory: pytest.TempPathFactory, bases: Callable[[str], Run], data: dict[str, Path]
) -> dict[str, Path]:
    """A tied model of 4-bit training, exported as a folder and as a Modelfile."""
    folder = tmp_path_factory.mktemp("exports")
    model = shaped("llama", folder / "tied", tie_word_embeddings=True, hidden_size=128)
    whole = tuned(folder / "whole", data, model, epochs=25)
    run = tuned(folder / "run", data, whole / "best_model", method="qlora", lora_rank=4, epochs=1, learning_rate=1e-4)
    for form in ("merged", "ollama"):
        assert forms.export(run, folder / form, form, prompts=6).certificate.deployable
    return {form: folder / form for form in ("merged", "ollama")}


@pytest.fixture
def export(exports: dict[str, Path], tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A copy of an export, to be spoilt."""
    yield lambda form: Path(shutil.copytree(exports[form], tmp_path / form))


def edit(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def changed_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({n: change(n, t).contiguous() for n, t in load_file(path).items()}, path, metadata={"format": "pt"})


def four_bits(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What peft does where it merges into a 4-bit layer: the sum is rounded to 16 values a block again."""
    if not name.endswith("proj.weight"):
        return tensor
    import bitsandbytes.functional as bits

    packed, state = bits.quantize_4bit(tensor.float(), blocksize=64, quant_type="nf4")
    return bits.dequantize_4bit(packed, state).reshape(tensor.shape).to(tensor.dtype)


def dropped(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != name}, path, metadata={"format": "pt"})


def one_number(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3] += 1
    return tensor


def template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>Assistant"))


def untied(folder: Path) -> None:
    """The head is a weight of its own: as random as one that is missing would be."""
    edit(folder / "config.json", tie_word_embeddings=False)
    path = folder / "model.safetensors"
    known = load_file(path)
    head = known["model.embed_tokens.weight"]
    save_file(known | {"lm_head.weight": torch.randn_like(head)}, path, metadata={"format": "pt"})


def rope(folder: Path) -> None:
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6})


FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {  # what is done, the check that fails, what it says
    "a character of the template": (template, "chat template", "the chat template is not the one of training"),
    "no stop token": (
        lambda f: edit(f / "generation_config.json", eos_token_id=None),
        "stop tokens",
        "a stop token of training is not among them: <|im_end|> (2)",
    ),
    "another rope base": (rope, "rope base", "a wrong rope base"),
    "a head that is not tied": (untied, "head", "a tied head is not tied"),
    "merged into 4 bits": (lambda f: changed_weights(f, four_bits), "weights", "was merged into 4-bit weights"),
    "one number": (
        lambda f: changed_weights(f, lambda n, t: one_number(t) if n == "model.norm.weight" else t),
        "weights",
        "model.norm.weight differs",
    ),
    "a setting": (lambda f: edit(f / "config.json", rms_norm_eps=1e-2), "settings", "rms_norm_eps is 0.01, not 1e-06"),
    "a further stop token": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[2, 13]),
        "generation",
        "generation_config.json has another eos_token_id",
    ),
    "a temperature": (lambda f: edit(f / "generation_config.json", temperature=9.0), "generation", "another temperature"),
    "another end": (
        lambda f: edit(f / "tokenizer_config.json", eos_token="<|im_start|>"),
        "tokenizer",
        "tokenizer_config.json is not the one of training",
    ),
    "a second weights file": (
        lambda f: save_file({"x": torch.zeros(2)}, f / "more.safetensors"),
        "files",
        "more.safetensors does not belong to it",
    ),
    "no numbers": (
        lambda f: changed_weights(f, lambda n, t: t * float("nan") if n == "model.norm.weight" else t),
        "weights",
        "model.norm.weight differs",
    ),
    "no embedding": (lambda f: dropped(f, "model.embed_tokens.weight"), "weights", "model.embed_tokens.weight is missing"),
    "half a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:900]) and None,
        "tokenizer",
        "tokenizer.json is not the one of training",
    ),
    "a pointer to code": (
        lambda f: edit(f / "config.json", auto_map={"AutoModelForCausalLM": "x--y.Z"}),
        "settings",
        "auto_map does not belong to it",
    ),
    "a template that is none": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}") and None,
        "chat template",
        "the chat template is not the one of training",
    ),
    "a configuration that is none": (lambda f: (f / "config.json").write_text("[]") and None, "files", "config.json"),
    "a rope that is none": (lambda f: edit(f / "config.json", rope_parameters="x"), "files", "str"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "files", "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "files", "not a whole safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_spoilt_folder_is_caught_by_name(case: str, export: Callable[[str], Path]) -> None:
    spoil, name, words = FOLDERS[case]
    folder = export("merged")
    spoil(folder)
    found = forms.parity(folder, prompts=6)
    causes = {check.name: check.cause for check in found.failed()}
    assert not found.deployable and words in causes[name], causes
    assert words in (folder / "NOT-DEPLOYABLE.txt").read_text()


def gguf_field(file: Path, key: str, new: float | int) -> None:
    """Overwrite a number in a GGUF file."""
    import gguf

    field = gguf.GGUFReader(file, "r+").fields[key]
    field.parts[field.data[0]][0] = new


def gguf_tensor(file: Path, name: str, change: Callable[[np.ndarray[Any, Any]], Any]) -> None:
    import gguf

    tensor = next(t for t in gguf.GGUFReader(file, "r+").tensors if t.name == name)
    tensor.data[:] = change(tensor.data.copy())


def gguf_again(file: Path, fields: dict[str, int], tensors: dict[str, np.ndarray[Any, Any]] | None = None) -> None:
    """Write a GGUF file anew, with more in it."""
    import gguf

    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_suffix(".new"), "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
    for name, value in fields.items():
        writer.add_uint32(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").rename(file)


def flipped(data: np.ndarray[Any, Any]) -> Any:
    data[3].view(np.uint8)[5] ^= 1
    return data


def nothing(data: np.ndarray[Any, Any]) -> Any:
    data[7] = np.nan
    return data


def gguf_template(file: Path) -> None:
    data = file.read_bytes()
    assert data.count(b"<|im_start|>assistant\n{% endif") == 1
    file.write_bytes(data.replace(b"<|im_start|>assistant\n{% endif", b"<|im_start|>Assistant\n{% endif"))


FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a character of the template": (gguf_template, "chat template", "the chat template is not the one of training"),
    "no stop token": (
        lambda f: gguf_field(f, "tokenizer.ggml.eos_token_id", 5),
        "stop tokens",
        "a stop token of training is not among them: <|im_end|> (2)",
    ),
    "another rope base": (lambda f: gguf_field(f, "llama.rope.freq_base", 5e5), "rope base", "a wrong rope base"),
    "heads not turned": (
        lambda f: gguf_tensor(f, "blk.1.attn_q.weight", lambda d: d[::-1]),
        "weights",
        "blk.1.attn_q.weight differs",
    ),
    "a word for another": (
        lambda f: f.write_bytes(f.read_bytes().replace("Ġwater".encode(), "Ġwatre".encode(), 1)),
        "vocabulary",
        "the vocabulary is not the one of training: tokens",
    ),
    "another padding": (
        lambda f: gguf_field(f, "tokenizer.ggml.padding_token_id", 7),
        "vocabulary",
        "padding_token_id",
    ),
    "a bit": (lambda f: gguf_tensor(f, "blk.0.ffn_up.weight", flipped), "weights", "blk.0.ffn_up.weight differs"),
    "a row of no numbers": (
        lambda f: gguf_tensor(f, "token_embd.weight", nothing),
        "weights",
        "token_embd.weight differs",
    ),
    "a further stop token": (
        lambda f: gguf_again(f, {"tokenizer.ggml.eot_token_id": 1236}),
        "stop tokens",
        "answers would end at",
    ),
    "a further setting": (
        lambda f: gguf_again(f, {"llama.attention.scale": 2}),
        "settings",
        "llama.attention.scale does not belong to it",
    ),
    "a further tensor": (
        lambda f: gguf_again(f, {}, {"rope_freqs.weight": np.full(16, 8, np.float32)}),
        "weights",
        "rope_freqs.weight does not belong to it",
    ),
    "another file": (lambda f: (f.parent / "evil.gguf").write_bytes(b"x") and None, "files", "GGUF files"),
    "gone": (lambda f: f.unlink(), "files", "is missing"),
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:300_000]), "files", "not a whole GGUF file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_spoilt_file_is_caught_by_name(case: str, export: Callable[[str], Path]) -> None:
    spoil, name, words = FILES[case]
    folder = export("ollama")
    spoil(next(folder.glob("*.gguf")))
    found = forms.parity(folder, prompts=6)
    causes = {check.name: check.cause for check in found.failed()}
    assert not found.deployable and words in causes[name], causes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<|im_start|>user", "<|im_start|>User"),
        ("{{ .Content }}<|im_end|>\n", "{{ .Content }}<|im_end|>\n" * 2),
        ('PARAMETER stop "<|im_end|>"\n', ""),
        ("temperature 0.7", "temperature 1.5"),
        ("num_ctx", "num_ctx_"),
        ("FROM ./", "\nFROM ./"),
    ],
)
def test_a_spoilt_modelfile_is_caught(old: str, new: str, export: Callable[[str], Path]) -> None:
    path = export("ollama") / "Modelfile"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert "Modelfile" in {check.name for check in forms.parity(path.parent, prompts=2).failed()}


# ---- what the figures are


class Stand:
    """A runtime that says what it is told to."""

    name = "a stand-in"

    def __init__(self, answers: list[Answer], likeliest: list[list[dict[int, float]]], ends: bool = True) -> None:
        self._answers, self._likeliest, self._ends = answers, iter(likeliest), ends

    def ends(self, prompt: list[int], token: int) -> bool:
        return self._ends and token == 2

    def answers(self, prompts: list[list[int]], most: int) -> list[Answer]:
        return self._answers[: len(prompts)]

    def next_tokens(self, ids: list[int], places: list[int]) -> list[dict[int, float]]:
        return next(self._likeliest)


OWN = Own(
    [[7, 8]],
    [Answer([3, 4], True)],
    2,
    [[7, 8, 3, 4, 2]],
    [[{3: -0.1, 5: -3.0}, {4: -0.5, 6: -0.53}, {2: -0.2, 9: -2.0}]],
)


def test_places_are_those_of_the_answer() -> None:
    assert OWN.places(0) == [2, 3, 4]
    long = Own([[1] * 5], [Answer([3] * 63, True)], 2, [[1] * 5 + [3] * 63 + [2]], [])
    assert long.places(0) == [5, 14, 23, 32, 41, 50, 59, 68]


def test_probabilities_by_hand() -> None:
    limit = {"drift": 0.1, "same": 0.9}
    there = [[{3: -0.2, 5: -2.0}, {4: -0.6, 6: -0.5}, {2: -0.2}]]
    drift, same = parity.probabilities(OWN, there, limit)
    assert drift.value == pytest.approx((0.1 + 0.1 + 0.0) / 3) and drift.passed
    assert same.value == 1.0  # token 6 is within the tie of 0.05
    far = [[{5: -0.2, 8: -4.0}, {4: -0.5}, {2: -0.2}]]
    drift, same = parity.probabilities(OWN, far, limit)
    assert drift.value == pytest.approx(3.9 / 3) and same.value == pytest.approx(
        2 / 3
    )  # 3 is as unlikely as the last: -4
    assert not drift.passed and not same.passed and "another model" in drift.cause


@pytest.mark.parametrize(
    ("answer", "exact", "passed"),
    [
        (Answer([3, 4], True), 1.0, True),
        (Answer([3, 6], True), 0.0, True),  # parts where 4 and 6 are about as likely
        (Answer([5, 4], True), 0.0, False),
        (Answer([3, 4, 9], False), 0.0, False),  # goes on where 2 is far likelier than 9
        (Answer([3], True), 0.0, False),
    ],
)
def test_greedy_answers_by_hand(answer: Answer, exact: float, passed: bool) -> None:
    found = parity.greedy(OWN, [answer], {"answers": 0.9})
    assert found.value == exact and found.passed == passed


def test_an_answer_that_goes_on_after_its_end_is_caught() -> None:
    """The end-of-turn token must end an answer, and be about as likely where the run's own model ended."""
    limit = {"same": 0.95}
    sure, other = [[{3: -0.1}, {4: -0.1}, {2: -0.1, 9: -2.0}]], [[{3: -0.1}, {4: -0.1}, {9: -0.1, 2: -0.7}]]
    near = [[{3: -0.1}, {4: -0.1}, {9: -0.1, 2: -0.5}]]

    def found(likeliest: list[list[dict[int, float]]], ends: bool = True) -> Check:
        return parity.stopping(Stand([], [], ends), OWN, likeliest, limit)  # type: ignore[arg-type]

    assert found(sure).passed and found(near).passed
    assert not found(sure, ends=False).passed and "it is no stop token there" in found(sure, ends=False).cause
    assert not found(other).passed and found(other).cause == "it no longer ends its answers"


# ---- Ollama's template

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
KIND = "<|im_start|>system\nYou are kind.<|im_end|>\n"
TEMPLATES = {
    "chatml": TURNS + OPENING,
    "a system prompt of its own": "{% if messages[0].role != 'system' %}" + KIND + "{% endif %}" + TURNS + OPENING,
    "no system prompt": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<start>{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>model\n{% endif %}"
    ),
    "braces": (
        "{% for m in messages %}{{ '{{' ~ m.role ~ '}}' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
    ),
}


def renderer(folder: Path, text: str) -> Renderer:
    shutil.copytree(find("starter"), folder)
    (folder / "chat_template.jinja").write_text(text)
    return Renderer(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_taken_apart(name: str, tmp_path: Path) -> None:
    """That the parts render as the template is what `parts` itself makes sure of; that they are written as Go is seen here."""
    found = ollama.parts(renderer(tmp_path / "m", TEMPLATES[name]))
    text = ollama.go_template(found, "")
    assert ("system" in found.before) == (name != "no system prompt")
    assert found.unsaid == (KIND if name == "a system prompt of its own" else "")
    assert ('{{ if ne (index .Messages 0).Role "system" }}' in text) == bool(found.unsaid)
    assert text.count("{{ end }}") == 2 + bool(found.unsaid)
    if name == "braces":
        assert '{{ "{{user}}" }}{{ .Content }}<|im_end|>' in text


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}[{{ loop.index }}]{{ m.content }}<|im_end|>{% endfor %}" + OPENING,
        "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
        "{{ messages[0].content }}<|im_end|>",
    ],
)
def test_a_template_that_does_more_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written as one of Ollama's"):
        ollama.parts(renderer(tmp_path / "m", text))


def test_the_system_prompt_that_the_rows_share(tmp_path: Path) -> None:
    def row(system: str | None) -> dict[str, Any]:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return {"messages": [*([{"role": "system", "content": system}] if system else []), *said]}

    def shared(items: list[dict[str, Any]]) -> str | None:
        return ollama.own_system(api.load(write(tmp_path / "rows.jsonl", items)))

    assert shared([row("Be kind.")] * 9 + [row(None)]) == "Be kind."
    assert shared([row("Be kind.")] * 8 + [row(None)] * 2) is None and shared([row(None)] * 10) is None
