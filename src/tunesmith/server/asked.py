"""What a request asks of a model: its prompt as tokens, how its answer is chosen; what cannot be done is refused."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from tunesmith.conversation import ROLES, Message
from tunesmith.errors import DataError
from tunesmith.local.sampling import Sampling
from tunesmith.render import Renderer
from tunesmith.server.inference import Host
from tunesmith.server.protocol import ChatRequest, CompletionRequest, Refusal

BIASES = 1024
COLDEST = 1e-5  # a lower temperature is none: logits divided by it leave 32 bits
ABSENT: dict[str, Any] = {  # what is not offered, and what says the same as nothing
    **dict.fromkeys(("functions", "function_call", "audio", "prediction", "web_search_options", "moderation")),
    "modalities": ["text"],
}
SHRINKS = 4  # times that a tokenizer may make a text shorter before it looks at it (composed letters)
PARTS = ("role", "content", "refusal", "name", "tool_calls", "tool_call_id", "function_call")  # of a message
OF_ASSISTANTS = ("refusal", "tool_calls", "function_call")


def refuse(body: ChatRequest) -> None:
    """What would silently change the meaning is refused."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refusal(400, "'max_tokens' and 'max_completion_tokens' are the same: give one", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "'top_logprobs' needs 'logprobs'", param="top_logprobs")
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise Refusal(400, "Only the response format 'text' is offered here", param="response_format")
    if given := next((name for name in ABSENT if getattr(body, name) not in (None, ABSENT[name])), None):
        raise Refusal(400, f"'{given}' is not offered here", param=given)
    if body.tool_choice not in (None, "auto", "none"):
        raise Refusal(400, "Only the tool choices 'auto' and 'none' are offered here", param="tool_choice")


def messages(given: list[dict[str, Any]]) -> list[Message]:
    found = []
    for number, message in enumerate(given):
        place, role = f"messages[{number}]", message.get("role")
        if role not in ROLES:
            raise Refusal(
                400, f"Invalid value: '{role}'. Supported values are: {', '.join(ROLES)}", param=f"{place}.role"
            )
        if more := next((key for key, value in message.items() if key not in PARTS and value), None):
            raise Refusal(400, f"Unrecognized request argument supplied: {place}.{more}", param=f"{place}.{more}")
        if role != "assistant" and (given_to := next((key for key in OF_ASSISTANTS if message.get(key)), None)):
            raise Refusal(400, "Only an assistant's message has it", param=f"{place}.{given_to}")
        if message.get("refusal") and message.get("content"):
            raise Refusal(400, "An answer or a refusal, not both", param=f"{place}.refusal")
        content = message.get("refusal") or message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, f"{place}.content") for part in content)
        calls, call = message.get("tool_calls"), message.get("function_call")
        if not calls and isinstance(call, dict) and isinstance(call.get("name"), str):  # the older way to write one
            calls = [{"type": "function", "function": call}]
        elif call is not None:
            words = "Expected an object with a name, and no 'tool_calls' beside it"
            raise Refusal(400, words, param=f"{place}.function_call")
        if content is None and not calls and role != "assistant" or not isinstance(content, str | None):
            raise Refusal(400, "Expected a string or an array of parts", param=f"{place}.content")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
            raise Refusal(400, "Expected an array of calls", param=f"{place}.tool_calls")
        texts = {key: message.get(key) for key in ("tool_call_id", "name")}
        if not all(isinstance(text, str | None) for text in texts.values()):
            raise Refusal(400, "Expected strings", param=place)
        told: Any = "system" if role == "developer" else role
        found.append(Message(told, content or "", tool_calls=calls, **texts))
    return found


def _part(part: Any, place: str) -> str:
    if (
        not isinstance(part, dict)
        or not isinstance(part.get("text"), str)
        or part.get("type") not in ("text", "refusal")
    ):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise Refusal(400, f"This model reads text only, not '{kind}'", param=place)
    return str(part["text"])


def refuse_long(texts: Iterable[str], host: Host, param: str) -> None:
    """Raises Refusal where texts are surely longer than the context, before any work is done on them."""
    context = host.base.decoder.context
    if host.longest and sum(map(len, texts)) > SHRINKS * host.longest * context:
        words = f"This model's maximum context length is {context} tokens; your request is longer by far"
        raise Refusal(400, words, param=param, code="context_length_exceeded")


def conversation(body: ChatRequest, host: Host) -> list[int]:
    """The prompt of a conversation."""
    given = messages(body.messages)
    refuse_long((message.content for message in given), host, "messages")
    try:
        return host.renderer.prompt_ids(given, tools(body, host.renderer))
    except DataError as error:
        raise Refusal(400, error.message, param="messages") from None


def tools(body: ChatRequest, renderer: Renderer) -> list[dict[str, Any]] | None:
    if not body.tools or body.tool_choice == "none":
        return None
    if "tools" not in renderer.template:
        raise Refusal(400, "This model's chat template knows no tools", param="tools")
    return body.tools


def prompts(given: str | list[Any], host: Host) -> list[list[int]]:
    """A text, texts, token ids or lists of them, as lists of ids."""
    renderer = host.renderer
    if isinstance(given, str) or given and all(isinstance(item, int) and not isinstance(item, bool) for item in given):
        given = [given]
    if len(given) > 128:
        raise Refusal(400, "At most 128 prompts", param="prompt")
    known, found = renderer.tokenizer.get_vocab_size(), []
    for item in given:
        if isinstance(item, str):
            refuse_long([item], host, "prompt")
            begin = renderer.special["bos_token"]
            text = item if not begin or item.startswith(begin) else begin + item
            ids = renderer.tokenizer.encode(text, add_special_tokens=False).ids or [renderer.stop_ids[0]]
        elif isinstance(item, list) and item and all(isinstance(i, int) and 0 <= i < known for i in item):
            ids = item
        else:
            raise Refusal(400, "Expected a string, strings, token ids or lists of them", param="prompt")
        found.append(ids)
    if not found:
        raise Refusal(400, "The prompt is empty", param="prompt")
    return found


def room(host: Host, prompt: int, asked: int | None, param: str) -> int:
    """Tokens that may be written. Raises Refusal where the context is too short for what is asked."""
    context, fits = host.base.decoder.context, host.base.decoder.longest
    left = fits - prompt
    if left < (1 if asked is None else asked):
        used = f"your request has {prompt} tokens" + (f" and asks for {asked}" if asked else "")
        words = f"This model's maximum context length is {context} tokens; {used}"
        if fits < context:
            words = f"This server has memory for {fits} tokens of a prompt and its answer; {used}"
        raise Refusal(400, words, param=param, code="context_length_exceeded")
    return left if asked is None else asked


def sampling(body: ChatRequest | CompletionRequest, host: Host, most: int, logprobs: int | None) -> Sampling:
    biases = {}
    if len(body.logit_bias or ()) > BIASES:
        raise Refusal(400, f"At most {BIASES} tokens", param="logit_bias")
    for token, bias in (body.logit_bias or {}).items():
        if not token.isdecimal() or len(token) > 9:
            raise Refusal(400, f"'{token}' is no token id", param="logit_bias")
        biases[int(token)] = bias
    return Sampling(
        max_tokens=most,
        temperature=1.0 if body.temperature is None else body.temperature if body.temperature >= COLDEST else 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        stop_ids=frozenset(host.renderer.stop_ids),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=biases,
        logprobs=logprobs,
    )


def seeds(how: Sampling, seed: int | None, count: int) -> list[Sampling]:
    first = secrets.randbits(62) if seed is None else seed
    return [msgspec.structs.replace(how, seed=(first + i) % 2**64) for i in range(count)]


def stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else [s for s in stop or () if s]


def usage(body: ChatRequest | CompletionRequest) -> bool:
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "'stream_options' needs 'stream'", param="stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)
