"""Models in memory: which stay, which go, and what a failure costs."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import rows, write
from training import fit
from tunesmith.backends import get
from tunesmith.local.sampling import Sampling
from tunesmith.models import read_json
from tunesmith.server import asked, inference
from tunesmith.server import store as db
from tunesmith.server.completions import _host
from tunesmith.server.inference import Host, Inference
from tunesmith.server.protocol import ChatRequest, Refusal
from tunesmith.server.service import Caller, Service


def using(act: Callable[[Inference], Awaitable[None]], **limits: int) -> None:
    async def all_of_it() -> None:
        made = Inference(**limits)
        made.start()
        try:
            await asyncio.wait_for(act(made), 60)
        finally:
            await made.stop()

    asyncio.run(all_of_it())


async def ask(made: Inference, host: Host, owner: str = "", **how: Any) -> str:
    text = ""
    async for piece in made.ask(host, [5, 6, 7], Sampling(**{"max_tokens": 4, **how}), [], False, owner):
        text += piece.text
    return text


def test_the_model_that_was_used_longest_ago_goes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")

    async def act(made: Inference) -> None:
        first = await made.host(tiny)
        want = await ask(made, first)
        await made.host(other)
        assert made.load()[0] == 1 and list(made._bases) == [str(other)]
        assert await ask(made, first) == want  # who still holds it has it loaded again
        assert list(made._bases) == [str(tiny)]
        slow = asyncio.create_task(ask(made, await made.host(tiny), max_tokens=400))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="All models in memory are in use"):
            await made.host(shutil.copytree(tiny, tmp_path / "third"))
        await slow
        monkeypatch.setattr(inference, "EXCHANGE", 20.0)
        folders = (tiny, other, tmp_path / "third")

        async def one(folder: Path) -> str:
            return await ask(made, await made.host(folder))

        texts = await asyncio.gather(*(one(folders[i % 3]) for i in range(12)))
        assert texts == [want] * 12 and made.load()[0] == 1  # all in turn, and nobody is sent away

    monkeypatch.setattr(inference, "EXCHANGE", 0.0)
    using(act, most_models=1)


def test_adapters_come_and_go_on_one_base(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "ADAPTERS", 2)
    data = write(tmp_path / "d.jsonl", rows(20))
    run = fit(tmp_path / "run", data, tiny, method="lora", learning_rate=5e-2, epochs=2)
    folders = [shutil.copytree(run / "final_model", tmp_path / f"a{i}") for i in range(3)]

    async def act(made: Inference) -> None:
        plain = await ask(made, await made.host(tiny))
        hosts = [await made.host(folder) for folder in folders]
        assert made.load()[0] == 1 and len(made._hosts) == 3  # the base and two adapters
        texts = [await ask(made, hosts[0])]  # forgotten: it is loaded again
        texts += [await ask(made, await made.host(folder)) for folder in (folders[0], folders[2])]
        assert texts.pop() == texts[0]
        assert texts[0] == texts[1] != plain
        made.forget(folders[2])
        kept = made._bases[str(tiny)].decoder.adapters
        assert str(folders[2]) not in made._hosts and str(folders[2]) not in kept and str(folders[0]) in kept
        assert await ask(made, await made.host(tiny)) == plain

    using(act)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_of_the_head_has_a_base_of_its_own(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", rows(20))
    inner = fit(tmp_path / "run", data, tiny, method="lora", max_steps=1) / "final_model"
    outer = shutil.copytree(inner, tmp_path / "outer")
    config, weights = read_json(outer / "adapter_config.json"), load_file(outer / "adapter_model.safetensors")
    torch.manual_seed(0)
    weights["base_model.model.lm_head.lora_A.weight"] = torch.randn(config["r"], 32)
    weights["base_model.model.lm_head.lora_B.weight"] = torch.randn(8192, config["r"])
    save_file(weights, outer / "adapter_model.safetensors")
    config["target_modules"] += ["lm_head"]
    (outer / "adapter_config.json").write_text(json.dumps(config))

    async def act(made: Inference) -> None:
        shared, own = await made.host(inner), await made.host(outer)
        assert shared.adapter == str(inner) and list(made._bases) == [str(tiny), str(outer)]
        assert own.adapter is None and own.base.key == str(outer)
        assert len({await ask(made, host, max_tokens=8) for host in (await made.host(tiny), own)}) == 2

    using(act)


def test_a_failing_step_fails_its_answers_and_no_others(tiny: Path) -> None:
    async def act(made: Inference) -> None:
        host = await made.host(tiny)
        want = await ask(made, host)
        step = host.base.decoder.step

        def fail() -> Any:
            raise RuntimeError("out of luck")

        host.base.decoder.step = fail  # type: ignore[method-assign]
        with pytest.raises(Refusal, match="could not go on"):
            await ask(made, host)
        host.base.decoder.step = step  # type: ignore[method-assign]
        assert await ask(made, host) == want and made.load() == (1, 0, 0)

    using(act)


def test_too_many_are_sent_away(tiny: Path) -> None:
    async def act(made: Inference) -> None:
        host = await made.host(tiny)
        with pytest.raises(Refusal, match="At most 3") as never:
            made.refuse_full(host, 4, "")
        waiting = [asyncio.create_task(ask(made, host, "ann", max_tokens=150)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal, match="of this key") as own:
            made.refuse_full(host, 1, "ann")
        for owner in ("bob", ""):
            made.refuse_full(host, 3, owner)
        waiting += [asyncio.create_task(ask(made, host, "", max_tokens=150)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal, match="requests are waiting") as later:
            made.refuse_full(host, 1, "bob")
        assert [error.value.status for error in (never, own, later)] == [400, 429, 429]
        assert later.value.headers["retry-after"] == own.value.headers["retry-after"] == "1"
        await asyncio.gather(*waiting)
        made.refuse_full(host, 3, "ann")

    using(act, most_answers=2, queue=4)


def test_prompts_and_models_are_read_beside_the_event_loop(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(made: Inference) -> None:
        ended, seen = threading.Event(), []

        def slow(*_: Any) -> str:
            seen.append(threading.current_thread().name.partition("_")[0])
            assert ended.wait(30)  # what the event loop does meanwhile
            return "read"

        monkeypatch.setattr(made, "_load", slow)
        loads = [asyncio.create_task(made.host(tiny.with_name(str(i)))) for i in range(40)]
        reading = asyncio.create_task(made.read(slow, 1))
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 5), 5) == 5  # the common threads are free
        assert sorted(seen) == ["loading", "reading"] and not reading.done()
        ended.set()
        assert {await reading, *await asyncio.gather(*loads)} == {"read"}

    using(act)


def test_a_prompt_that_is_longer_by_far_is_not_even_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(made: Inference) -> None:
        host = await made.host(tiny)
        most = asked.SHRINKS * host.longest * host.base.decoder.context
        assert host.longest > 4 and len(asked.prompts("a" * most, host)[0]) > host.base.decoder.context
        monkeypatch.setattr(host.renderer, "tokenizer", None)  # no use is made of it
        body = ChatRequest(model="x", messages=[{"role": "user", "content": "a" * (most // 2 + 1)}] * 2)
        with pytest.raises(Refusal, match="longer by far") as error:
            asked.conversation(body, host)
        assert error.value.code == "context_length_exceeded" and error.value.status == 400

    using(act)


def test_what_the_memory_has_no_room_for_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "free_memory", lambda: 8 * 128 * 2 * 2 * 2 * 8 * 4.0)  # of 1,024 tokens

    async def act(made: Inference) -> None:
        host = await made.host(tiny)
        assert host.base.decoder.longest == 128 < host.base.decoder.context  # a quarter of a half
        assert asked.room(host, 28, 100, "prompt") == asked.room(host, 28, None, "prompt") == 100
        with pytest.raises(Refusal, match="memory for 128 tokens") as error:
            asked.room(host, 28, 101, "prompt")
        assert error.value.status == 400
        assert len(await ask(made, host, max_tokens=125)) > 0

    using(act)


def test_a_checkpoint_whose_folder_is_gone_is_no_model(tmp_path: Path, tiny: Path) -> None:
    made = Service(tmp_path / "data", get("fake"), {"tiny": tiny})
    folder = tmp_path / "data" / "c"
    made.store.add(db.models, id="ft:x", owner="", job_id=None, folder="c")
    with pytest.raises(Refusal) as error:
        made.folder("ft:x", Caller("", True))
    assert (error.value.status, error.value.code) == (404, "model_not_found")
    folder.mkdir()
    assert made.folder("ft:x", Caller("", True)) == folder
    call: Any = SimpleNamespace(service=made, caller=Caller("", True))

    async def act(inference: Inference) -> None:
        made.inference = inference
        with pytest.raises(Refusal, match="gone") as error:  # an empty one
            await _host(call, "ft:x")
        assert error.value.status == 500
        host = inference.host

        async def late(path: Path) -> Host:
            folder.rmdir()
            return await host(path)

        inference.host = late  # type: ignore[method-assign]
        with pytest.raises(Refusal) as error:
            await _host(call, "ft:x")
        assert (error.value.status, error.value.code) == (404, "model_not_found")

    using(act)


def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path, tiny: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")

    async def act(made: Inference) -> None:
        with pytest.raises(Refusal, match="cannot be loaded") as error:
            await made.host(broken)
        assert error.value.status == 500 and str(tmp_path) not in error.value.message
        await made.host(tiny)

    using(act)


def test_no_field_of_a_message_is_dropped() -> None:
    call = {"name": "f", "arguments": "{}"}
    empty: dict[str, Any] = {"refusal": None, "annotations": [], "audio": None}  # as the SDK's own objects have them
    given = [
        {"role": "assistant", "content": None, "function_call": call, **empty},
        {"role": "assistant", "refusal": "No."},
    ]
    first, second = asked.messages(given)
    assert first.tool_calls == [{"type": "function", "function": call}] and second.content == "No."


def test_a_model_that_goes_leaves_the_memory_before_the_next_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    load = inference.models.to_judge

    def to_judge(name: str) -> Any:
        deadline = time.monotonic() + 5
        while any(model() for model in alive) and time.monotonic() < deadline:  # what reads may be at its last step
            gc.collect()
            time.sleep(0.05)
        assert not any(model() for model in alive)
        model = load(name)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(inference.models, "to_judge", to_judge)

    async def act(made: Inference) -> None:
        for folder in (tiny, shutil.copytree(tiny, tmp_path / "other"), shutil.copytree(tiny, tmp_path / "third")):
            assert await ask(made, await made.host(folder))

    using(act, most_models=1)
    assert len(alive) == 3
