"""Every endpoint, every error row and what the SDK does, as the contract has them: a table of requests and answers."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from serving import Answer, Server, chats

BAD_REQUEST = "invalid_request_error"
CHAT = {"model": "starter", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
TEXT = {"model": "starter", "prompt": "Hello", "max_tokens": 3}
JOB = {"model": "tiny", "training_file": "file-none"}

# method, path, body, status, then what the envelope says: param, code, a part of the message
REFUSED: list[tuple[str, str, Any, int, str | None, str | None, str]] = [
    ("GET", "/nothing", None, 404, None, None, "Unknown request URL: GET /v1/nothing"),
    ("PUT", "/files", None, 405, None, None, "Not allowed: PUT"),
    ("GET", "/files/file-x", None, 404, "id", None, "No such File object: file-x"),
    ("GET", "/files/file-x/content", None, 404, "id", None, "No such File object: file-x"),
    ("DELETE", "/files/file-x", None, 404, "id", None, "No such File object: file-x"),
    ("GET", "/files?limit=0", None, 400, "limit", "invalid_value", "limit"),
    ("GET", "/files?limit=10001", None, 400, "limit", "invalid_value", "10000"),
    ("GET", "/files?order=up", None, 400, "order", "invalid_value", "order"),
    ("GET", "/files?after=file-x", None, 400, "after", None, "No such cursor"),
    ("POST", "/uploads", {}, 400, "filename", "missing_required_parameter", "filename"),
    ("POST", "/uploads/upload_x/complete", {"part_ids": ["a"]}, 404, "id", None, "No such Upload object"),
    ("POST", "/uploads/upload_x/cancel", None, 404, "id", None, "No such Upload object"),
    ("GET", "/fine_tuning/jobs/ftjob-x", None, 404, "fine_tune_id", "fine_tune_not_found", "Could not find fine tune: ftjob-x"),
    ("POST", "/fine_tuning/jobs/ftjob-x/cancel", None, 404, "fine_tune_id", "fine_tune_not_found", "ftjob-x"),
    ("POST", "/fine_tuning/jobs/ftjob-x/pause", None, 404, "fine_tune_id", "fine_tune_not_found", "ftjob-x"),
    ("POST", "/fine_tuning/jobs/ftjob-x/resume", None, 404, "fine_tune_id", "fine_tune_not_found", "ftjob-x"),
    ("GET", "/fine_tuning/jobs/ftjob-x/events", None, 404, "fine_tune_id", "fine_tune_not_found", "ftjob-x"),
    ("GET", "/fine_tuning/jobs/ftjob-x/checkpoints", None, 404, "fine_tune_id", "fine_tune_not_found", "ftjob-x"),
    ("POST", "/fine_tuning/alpha/graders/run", {}, 404, None, None, "Unknown request URL"),
    ("GET", "/fine_tuning/checkpoints/m/permissions", None, 404, None, None, "Unknown request URL"),
    ("POST", "/fine_tuning/jobs", b"{", 400, None, None, "could not parse the JSON body"),
    ("POST", "/fine_tuning/jobs", b'{"a":', 400, None, None, "could not parse the JSON body"),
    ("POST", "/fine_tuning/jobs", b"\xff\xfe", 400, None, None, "could not parse the JSON body"),
    ("POST", "/chat/completions", b'{"messages":[{"a":' + b"[" * 50_000, 400, None, None, "could not parse the JSON body"),
    ("POST", "/completions", {**TEXT, "prompt": ["x"] * 128, "n": 128}, 400, None, None, "answers to a request"),
    ("POST", "/fine_tuning/jobs", b"[]", 400, None, "invalid_value", "object"),
    ("POST", "/fine_tuning/jobs", {"training_file": "f"}, 400, "model", "missing_required_parameter", "model"),
    ("POST", "/fine_tuning/jobs", {**JOB, "epochs": 3}, 400, "epochs", None, "Unrecognized request argument supplied: epochs"),
    ("POST", "/fine_tuning/jobs", {**JOB, "model": "gpt-9"}, 404, "model", "model_not_found", "The model `gpt-9` does not exist or you do not have access to it."),
    ("POST", "/fine_tuning/jobs", JOB, 400, "training_file", "invalid_file_id", "file-none"),
    ("POST", "/fine_tuning/jobs", {**JOB, "seed": 2**31}, 400, "seed", "invalid_value", "2147483647"),
    ("POST", "/fine_tuning/jobs", {**JOB, "suffix": "x" * 65}, 400, "suffix", "invalid_value", "64"),
    ("POST", "/fine_tuning/jobs", {**JOB, "hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", "invalid_value", "1"),
    ("POST", "/fine_tuning/jobs", {**JOB, "hyperparameters": {"n_epochs": 51}}, 400, "hyperparameters.n_epochs", "invalid_value", "50"),
    ("POST", "/fine_tuning/jobs", {**JOB, "hyperparameters": {"batch_size": 257}}, 400, "hyperparameters.batch_size", "invalid_value", "256"),
    ("POST", "/fine_tuning/jobs", {**JOB, "hyperparameters": {"learning_rate_multiplier": 0}}, 400, "hyperparameters.learning_rate_multiplier", "invalid_value", "0"),
    ("POST", "/fine_tuning/jobs", {**JOB, "hyperparameters": {"n_epochs": "some"}}, 400, "hyperparameters.n_epochs", "invalid_value", "some"),
    ("POST", "/fine_tuning/jobs", {**JOB, "method": {"type": "dpo", "dpo": {}}}, 400, "method.type", None, "'dpo' is not offered"),
    ("POST", "/fine_tuning/jobs", {**JOB, "method": {"type": "reinforcement"}}, 400, "method.type", None, "'reinforcement' is not offered"),
    ("POST", "/fine_tuning/jobs", {**JOB, "integrations": [{"type": "wandb"}]}, 400, "integrations", None, "not offered"),
    ("POST", "/fine_tuning/jobs", {**JOB, "metadata": {str(i): "x" for i in range(17)}}, 400, "metadata", None, "16 pairs"),
    ("POST", "/fine_tuning/jobs", {**JOB, "metadata": {"k" * 65: "x"}}, 400, "metadata", None, "64"),
    ("POST", "/fine_tuning/jobs", {**JOB, "metadata": {"k": "x" * 513}}, 400, "metadata", None, "512"),
    ("POST", "/fine_tuning/jobs", {**JOB, "metadata": {"k": 1}}, 400, "metadata", "invalid_value", "str"),
    ("GET", "/models/gpt-9", None, 404, "model", "model_not_found", "`gpt-9`"),
    ("GET", "/models/Qwen%2FQwen2.5", None, 404, "model", "model_not_found", "`Qwen/Qwen2.5`"),
    ("DELETE", "/models/starter", None, 403, "model", "insufficient_permissions", "cannot be deleted"),
    ("DELETE", "/models/ft:x:y::z", None, 404, "model", "model_not_found", "ft:x:y::z"),
    ("POST", "/chat/completions", {**CHAT, "model": "gpt-9"}, 404, "model", "model_not_found", "`gpt-9`"),
    ("POST", "/chat/completions", {**CHAT, "messages": []}, 400, "messages", "invalid_value", "length"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", None, "robot"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "messages[0].content", None, "string"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x", "image": "y"}]}, 400, "messages[0].image", None, "messages[0].image"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": "x", "function_call": "y"}]}, 400, "messages[0].function_call", None, "object"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "assistant", "function_call": {}}]}, 400, "messages[0].function_call", None, "with a name"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": "x", "refusal": "y"}]}, 400, "messages[0].refusal", None, "not both"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "user", "refusal": "y"}]}, 400, "messages[0].refusal", None, "assistant"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", None, "string"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content", None, "image_url"),
    ("POST", "/chat/completions", {**CHAT, "temperature": 2.1}, 400, "temperature", "invalid_value", "2"),
    ("POST", "/chat/completions", {**CHAT, "top_p": -0.1}, 400, "top_p", "invalid_value", "0"),
    ("POST", "/chat/completions", {**CHAT, "n": 129}, 400, "n", "invalid_value", "128"),
    ("POST", "/chat/completions", {**CHAT, "stop": list("abcde")}, 400, "stop", "invalid_value", "4"),
    ("POST", "/chat/completions", {**CHAT, "presence_penalty": 3}, 400, "presence_penalty", "invalid_value", "2"),
    ("POST", "/chat/completions", {**CHAT, "logit_bias": {"1": 101}}, 400, "logit_bias", "invalid_value", "100"),
    ("POST", "/chat/completions", {**CHAT, "logit_bias": {"a": 1}}, 400, "logit_bias", None, "'a' is no token id"),
    ("POST", "/chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs", None, "needs 'logprobs'"),
    ("POST", "/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value", "20"),
    ("POST", "/chat/completions", {**CHAT, "max_completion_tokens": 3}, 400, "max_tokens", None, "the same"),
    ("POST", "/chat/completions", {**CHAT, "max_tokens": 5000}, 400, "messages", "context_length_exceeded", "maximum context length is 2048"),
    ("POST", "/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "a b " * 2000}]}, 400, "messages", "context_length_exceeded", "2048"),
    ("POST", "/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", None, "text"),
    ("POST", "/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools", None, "knows no tools"),
    ("POST", "/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice", None, "auto"),
    ("POST", "/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, 400, "stream_options", None, "needs 'stream'"),
    ("POST", "/chat/completions", {**CHAT, "functions": []}, 400, "functions", None, "'functions' is not offered here"),
    ("POST", "/chat/completions", {**CHAT, "modalities": ["text", "audio"]}, 400, "modalities", None, "not offered"),
    ("POST", "/chat/completions", {**CHAT, "answers": None}, 400, "answers", None, "Unrecognized request argument supplied: answers"),
    ("POST", "/completions", {**TEXT, "suffix": "x"}, 400, "suffix", None, "suffix"),
    ("POST", "/completions", {**TEXT, "best_of": 2}, 400, "best_of", None, "best_of"),
    ("POST", "/completions", {**TEXT, "prompt": []}, 400, "prompt", None, "empty"),
    ("POST", "/completions", {**TEXT, "prompt": [1, 99999999]}, 400, "prompt", None, "token ids"),
    ("POST", "/completions", {**TEXT, "prompt": [None]}, 400, "prompt", None, "token ids"),
    ("POST", "/completions", {**TEXT, "logprobs": 6}, 400, "logprobs", "invalid_value", "5"),
    ("POST", "/completions", {**TEXT, "max_tokens": 0}, 400, "max_tokens", None, "nothing is asked for"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status", "param", "code", "words"), REFUSED)
def test_refusals_are_in_the_envelope(
    server: Server, method: str, path: str, body: Any, status: int, param: str | None, code: str | None, words: str
) -> None:
    found = server.ask(method, path, body)
    assert found.status == status, found.body
    error = found.error()
    assert error["type"] == BAD_REQUEST and error["param"] == param and error["code"] == code, error
    assert words in error["message"]
    assert "traceback" not in server.log.read_text()


def test_the_table_covers_every_route() -> None:
    from tunesmith.server.run import ROUTES

    assert len(ROUTES) == 24 and len(REFUSED) >= 70
    asked = {(method, path.partition("?")[0]) for method, path, *_ in REFUSED}
    untried = {(r.method, r.path) for r in ROUTES if not any(m == r.method and _fits(r.path, p) for m, p in asked)}
    # their refusals stand in other tests: no request of these can be wrong, or the body is a form
    assert untried == {
        ("POST", "/files"), ("GET", "/fine_tuning/jobs"), ("GET", "/models"), ("POST", "/uploads/{upload_id}/parts"),
        ("GET", "/health"), ("GET", "/metrics"),
    }  # fmt: skip


def _fits(route: str, path: str) -> bool:
    wanted, given = route.split("/"), path.split("/")
    return len(wanted) == len(given) and all(w.startswith("{") or w == g for w, g in zip(wanted, given, strict=True))


# ---- what the SDK makes of it


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/files/file-x", openai.NotFoundError),
        ("/files?limit=0", openai.BadRequestError),
        ("/models/starter", openai.PermissionDeniedError),
    ],
)
def test_the_sdk_reads_the_envelope(server: Server, path: str, kind: type[openai.APIStatusError]) -> None:
    call = server.client().delete if path == "/models/starter" else server.client().get
    with pytest.raises(kind) as caught:
        call(path, cast_to=object)
    error = caught.value
    assert error.request_id and error.request_id.startswith("req_") and error.type == BAD_REQUEST
    assert isinstance(error.body, dict) and str(error.body.pop("message")) in error.message
    assert error.body == {"type": error.type, "param": error.param, "code": error.code}


def test_paths_without_v1_lead_to_the_same(server: Server) -> None:
    with openai.OpenAI(base_url=server.url.removesuffix("/v1"), api_key="x") as bare:
        assert [m.id for m in bare.models.list()][:2] == ["starter", "tiny"]


def test_empty_posts_with_a_json_type_are_taken(server: Server, tuned: dict[str, Any]) -> None:
    found = server.ask("POST", f"/fine_tuning/jobs/{tuned['id']}/cancel", b"", {"content-length": "0"})
    assert found.status == 400 and "is succeeded and cannot be cancelled" in found.error()["message"]


def test_unknown_headers_and_nulls_are_taken(server: Server) -> None:
    nulls = dict.fromkeys(CompletionCreateParamsBase.__annotations__) | {"max_completion_tokens": 3}  # as the SDK knows
    body = {**nulls, **CHAT, "max_tokens": None, "modalities": ["text"]}
    assert len(nulls) > 30 and "functions" in nulls
    found = server.ask("POST", "/chat/completions", body, {"OpenAI-Organization": "o", "x-stainless-lang": "python"})
    assert found.status == 200 and found.json()["choices"][0]["message"]["role"] == "assistant"


# ---- files


def test_files_are_listed_in_pages(server: Server) -> None:
    ids = [server.upload(chats(1, i), f"f{i}.jsonl", "user_data").json()["id"] for i in range(5)]
    seen, after = [], ""
    while True:
        page = server.ask("GET", f"/files?purpose=user_data&limit=2{after}").json()
        seen += [f["id"] for f in page["data"]]
        assert page["object"] == "list" and page["first_id"] == page["data"][0]["id"]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert seen[:5] == ids[::-1] and len(seen) == len(set(seen))
    oldest = server.ask("GET", "/files?purpose=user_data&order=asc&limit=1").json()["data"][0]
    assert oldest["id"] == ids[0]
    assert [f.id for f in server.client().files.list(purpose="user_data", limit=2)][:5] == ids[::-1]
    gone = server.ask("DELETE", f"/files/{ids[0]}").json()
    assert gone == {"id": ids[0], "object": "file", "deleted": True}
    assert server.ask("GET", f"/files/{ids[0]}/content").status == 404


def test_a_file_is_kept_byte_for_byte_with_a_harmless_name(server: Server, strict: openai.OpenAI) -> None:
    data = bytes(range(256)) * 3
    for name, kept in (
        ("../../etc/passwd", "passwd"),
        ("a\\b.jsonl", "b.jsonl"),
        ("x\u202e.jsonl", "x.jsonl"),
        ("n" * 400, "n" * 255),
    ):
        made = strict.files.create(file=(name, data), purpose="fine-tune")
        assert made.filename == kept and made.bytes == len(data) and made.status == "processed"
        assert strict.files.content(made.id).read() == data
    assert strict.files.create(file=data, purpose="fine-tune").filename == "upload"  # the SDK's name for bare bytes
    short = strict.files.create(
        file=("t.jsonl", data), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert short.expires_at == short.created_at + 3600


@pytest.mark.parametrize(
    ("parts", "param", "words"),
    [
        ([("file", "a.jsonl", b"{}")], "purpose", "Missing required parameter: 'purpose'"),
        ([("purpose", None, b"party"), ("file", "a.jsonl", b"{}")], "purpose", "'party' is not one of"),
        ([("purpose", None, b"fine-tune-results"), ("file", "a", b"{}")], "purpose", "is not one of"),
        ([("purpose", None, b"fine-tune")], "file", "Missing required parameter: 'file'"),
        ([("purpose", None, b"fine-tune"), ("file", "a", b"1"), ("file", "b", b"2")], "file", "came twice"),
        ([("purpose", None, b"x" * 9000), ("file", "a", b"1")], "purpose", "too long"),
        ([("purpose", None, b"fine-tune"), ("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"5"), ("file", "a", b"1")], "expires_after", "3600"),
        ([(f"f{i}", None, b"") for i in range(30)], None, "damaged"),
    ],
)  # fmt: skip
def test_wrong_forms_are_refused(server: Server, parts: list[Any], param: str | None, words: str) -> None:
    found = server.form("/files", parts)
    error = found.error()
    assert found.status == 400 and error["param"] == param and words in error["message"], error
    files = server.folder / "files"
    assert not list(files.glob("*.tmp"))  # nothing of it was kept


def test_a_body_that_is_no_form_is_refused(server: Server) -> None:
    assert (
        server.ask("POST", "/files", {"purpose": "fine-tune"}).error()["message"]
        == "Expected a multipart/form-data body"
    )
    cut = server.ask("POST", "/files", b"--xyz\r\nContent-Disp", {"content-type": "multipart/form-data; boundary=xyz"})
    assert cut.status == 400 and "damaged" in cut.error()["message"]
    packed = server.ask("POST", "/chat/completions", b"\x1f\x8b", {"content-encoding": "gzip"})
    assert packed.status == 415 and "Packed" in packed.error()["message"]


def test_uploads_in_parts(server: Server, strict: openai.OpenAI) -> None:
    data = chats(40)
    made = strict.uploads.create(
        filename="big.jsonl", purpose="fine-tune", bytes=len(data), mime_type="application/jsonl"
    )
    assert made.status == "pending" and made.file is None
    parts = [strict.uploads.parts.create(made.id, data=data[i : i + 1000]).id for i in range(0, len(data), 1000)]
    with pytest.raises(openai.BadRequestError, match="were announced"):
        strict.uploads.complete(made.id, part_ids=parts[:-1])
    with pytest.raises(openai.BadRequestError, match="md5"):
        strict.uploads.complete(made.id, part_ids=parts, md5="0" * 32)
    with pytest.raises(openai.NotFoundError, match="No such Part"):
        strict.uploads.complete(made.id, part_ids=["part_x"])
    whole = strict.uploads.complete(made.id, part_ids=parts)
    assert whole.status == "completed" and whole.file and strict.files.content(whole.file.id).read() == data
    assert not [part for part in parts if (server.folder / "files" / part).exists()]
    again = strict.uploads.complete(made.id, part_ids=parts)  # as when the first answer was lost
    assert again == whole
    for other_parts in (parts[::-1], parts[:1]):
        with pytest.raises(openai.BadRequestError, match="is completed"):
            strict.uploads.complete(made.id, part_ids=other_parts)
    with pytest.raises(openai.BadRequestError, match="is completed"):
        strict.uploads.parts.create(made.id, data=b"more")
    other = strict.uploads.create(filename="b", purpose="fine-tune", bytes=3, mime_type="text/plain")
    part = strict.uploads.parts.create(other.id, data=b"abc").id
    assert strict.uploads.cancel(other.id).status == "cancelled" and not (server.folder / "files" / part).exists()
    chunked = server.client().uploads.upload_file_chunked(
        file=data,
        filename="c.jsonl",
        bytes=len(data),
        mime_type="application/jsonl",
        purpose="fine-tune",
        part_size=3000,
    )
    assert chunked.file and server.client().files.content(chunked.file.id).read() == data


def test_parts_are_no_more_than_was_announced(server: Server) -> None:
    order = {"filename": "b", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"}
    upload = server.ask("POST", "/uploads", order).json()["id"]
    before = set((server.folder / "files").iterdir())

    def add(data: bytes) -> Answer:
        return server.form(f"/uploads/{upload}/parts", [("data", "d", data)])

    large = add(b"abcd")
    assert large.status == 413 and large.error()["param"] == "data"
    assert add(b"abc").status == add(b"abc").status == 200  # the second is the first again, whose answer was lost
    more = add(b"d")
    assert more.status == 400 and "3 were announced" in more.error()["message"]
    assert len(set((server.folder / "files").iterdir()) - before) == 2
    assert server.ask("POST", f"/uploads/{upload}/cancel").status == 200
    assert set((server.folder / "files").iterdir()) == before
    long = server.ask("POST", "/uploads", {**order, "mime_type": "x" * 256})
    assert long.status == 400 and long.error()["param"] == "mime_type"
    assert server.ask("POST", "/uploads", {**order, "filename": "x" * 513}).status == 400


# ---- the document of itself


def test_the_openapi_document_names_every_route(server: Server) -> None:
    from tunesmith.server.run import ROUTES

    found = json.loads(server.ask("GET", "/openapi.json").body)
    described = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
    assert len(described) == len(ROUTES)
    assert found["components"]["schemas"]["NewJob"]["required"] == ["model", "training_file"]
