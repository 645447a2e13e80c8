"""What goes over the wire: requests with their limits, and objects, as OpenAI's protocol names them.

In requests an explicit null is the same as nothing. A field that is not known is refused, never dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Text = Annotated[str, Meta(min_length=1, max_length=512)]
Time = int  # seconds since 1970

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
RESULTS = "fine-tune-results"


class Refusal(Exception):
    """A request that is answered with an error: HTTP status, message, and what the envelope says besides."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = headers or {}

    def envelope(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def no_such(what: str, id: str) -> Refusal:
    """404 for a file, upload or job that is not there, or is another key's."""
    if what == "job":
        return Refusal(404, f"Could not find fine tune: {id}", param="fine_tune_id", code="fine_tune_not_found")
    return Refusal(404, f"No such {what} object: {id}", param="id")


def busy(message: str, seconds: int) -> Refusal:
    """429: the same request can be sent again after some seconds."""
    return Refusal(429, message, type="requests", code="rate_limit_exceeded", headers={"retry-after": str(seconds)})


def no_model(name: str) -> Refusal:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return Refusal(404, message, param="model", code="model_not_found")


# ---- objects


class File(msgspec.Struct):
    id: str
    bytes: int
    created_at: Time
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None
    expires_at: Time | None = None
    object: Literal["file"] = "file"


class Upload(msgspec.Struct):
    id: str
    bytes: int
    created_at: Time
    expires_at: Time
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None = None
    object: Literal["upload"] = "upload"


class Part(msgspec.Struct):
    id: str
    created_at: Time
    upload_id: str
    object: Literal["upload.part"] = "upload.part"


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: Literal[True] = True


class Listing(msgspec.Struct):
    """A page. The ids of its ends are told where the protocol has them."""

    data: list[Any]
    has_more: bool = False
    first_id: str | UnsetType | None = UNSET
    last_id: str | UnsetType | None = UNSET
    object: Literal["list"] = "list"


class Model(msgspec.Struct):
    id: str
    created: Time
    owned_by: str
    shutdown_date: str | None = None
    object: Literal["model"] = "model"


class JobError(msgspec.Struct):
    code: str
    message: str
    param: str | None = None


class Hyperparameters(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    n_epochs: Annotated[int, Meta(ge=1, le=50)] | Literal["auto"] | None = None
    batch_size: Annotated[int, Meta(ge=1, le=256)] | Literal["auto"] | None = None
    learning_rate_multiplier: Annotated[float, Meta(gt=0, le=1e6)] | Literal["auto"] | None = None


class Supervised(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    hyperparameters: Hyperparameters | None = None


class Method(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """dpo and reinforcement are known, so that their refusal can say what is wrong."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class Job(msgspec.Struct):
    """`error` is null while all is well: strict clients take nothing else."""

    id: str
    created_at: Time
    model: str
    status: str
    training_file: str
    validation_file: str | None
    hyperparameters: Hyperparameters
    method: dict[str, Any]
    seed: int
    organization_id: str
    result_files: list[str] = []
    error: JobError | None = None
    fine_tuned_model: str | None = None
    finished_at: Time | None = None
    trained_tokens: int | None = None
    estimated_finish: Time | None = None
    integrations: list[Any] = []
    metadata: dict[str, str] | None = None
    user_provided_suffix: str | None = None
    usage_metrics: None = None
    shared_with_openai: bool = False
    object: Literal["fine_tuning.job"] = "fine_tuning.job"


class Event(msgspec.Struct):
    id: str
    created_at: Time
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = {}
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"


class Checkpoint(msgspec.Struct):
    id: str
    created_at: Time
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"


# ---- requests


class NewJob(msgspec.Struct, forbid_unknown_fields=True):
    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2147483647)] | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = None


class Expiry(msgspec.Struct, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=3600, le=2592000)]


class NewUpload(msgspec.Struct, forbid_unknown_fields=True):
    filename: Text
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    bytes: Annotated[int, Meta(ge=0, le=1 << 40)]
    mime_type: Annotated[str, Meta(max_length=255)]
    expires_after: Expiry | None = None


class WholeUpload(msgspec.Struct, forbid_unknown_fields=True):
    part_ids: Annotated[list[str], Meta(min_length=1, max_length=10_000)]
    md5: str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(max_length=256)]
Stops = Stop | Annotated[list[Stop], Meta(max_length=4)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class ChatRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields from `store` on are taken and change nothing here; of those from `functions` on only null is."""

    model: Text
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: Stops | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    user: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None


class CompletionRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Text
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: Stops | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    user: str | None = None
    prompt: str | list[Any]
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    suffix: str | None = None
