"""Routes: who asks, within which limits, and how every answer and every error is written.

Each route is a row of a table in its module; from the same rows come the dispatch and the OpenAPI document.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import ipaddress
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as Path

from tunesmith.server.protocol import Refusal
from tunesmith.server.service import Caller, Service
from tunesmith.server.store import new_id

log = logging.getLogger("tunesmith.server")
JSON = "application/json"
BODY = 16 << 20  # bytes of a JSON request


class Route(msgspec.Struct, frozen=True):
    """`act(call)` or `act(call, body)` is an async function, or a plain one that is run in a thread. `query`: a Struct of what
    may stand after the "?". `open`: asked without a key."""

    method: str
    path: str
    act: Callable[..., Any]
    gives: Any = None
    body: Any = None
    query: Any = None
    open: bool = False
    form: dict[str, Any] | None = None  # the parts of a multipart body, as a JSON schema


class Call:
    """One request on its way: who asks, what it may use, what the path and the query say."""

    def __init__(self, request: Request, service: Service, caller: Caller, query: Any) -> None:
        self.request, self.service, self.caller, self.query = request, service, caller, query
        self.path: dict[str, str] = request.path_params
        self.store = service.store

    @property
    def owner(self) -> str:
        return str(self.caller.owner)


def build(service: Service, routes: list[Route]) -> Starlette:
    """The application: every route under /v1 and, for clients that forget it, at the root."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    document = msgspec.json.encode(openapi(routes))

    async def described(_: Request) -> Response:
        return Response(document, media_type=JSON)

    paths = []
    for prefix in ("/v1", ""):
        paths.append(Path(f"{prefix}/openapi.json", described, methods=["GET"]))
        for path in dict.fromkeys(route.path for route in routes):
            here = {route.method: route for route in routes if route.path == path}
            paths.append(Path(prefix + path, _dispatch(service, here), methods=list(here)))
    return Starlette(routes=paths, lifespan=lifespan, exception_handlers={HTTPException: _plain, Exception: _plain})


async def _plain(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: no such path, another method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: f"Unknown request URL: {request.method} {request.url.path}", 405: f"Not allowed: {request.method}"}
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return _refused(Refusal(status, words.get(status, "The server had an error"), headers=headers), new_id("req_"))


def _dispatch(service: Service, routes: dict[str, Route]) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        route = routes.get(request.method) or routes["GET"]  # HEAD
        asked, began = new_id("req_"), time.perf_counter()
        caller: Caller | None = None
        try:
            caller = Caller("", False) if route.open else service.caller(request.headers.get("authorization", ""))
            if not service.keyed:
                _refuse_foreign(request, service.host)
            if not route.open:
                service.limit_rate(caller)
            response = await _act(route, Call(request, service, caller, _query(route, request)))
            response.headers["x-request-id"] = asked
        except Refusal as refusal:
            response = _refused(refusal, asked)
        except ClientDisconnect:
            response = Response(status_code=499)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("failed", extra={"about": {"request_id": asked, "error": type(error).__name__}})
            response = _refused(Refusal(500, "The server had an error", type="server_error"), asked)
        took = time.perf_counter() - began
        service.counted(route.method, route.path, response.status_code, took)
        about = {
            "request_id": asked,
            "method": request.method,
            "path": route.path,
            "status": response.status_code,
            "seconds": round(took, 4),
            "key": caller.owner if caller else None,
        }
        log.info("request", extra={"about": about})
        return response

    return handle


def _refuse_foreign(request: Request, bound: str) -> None:
    """Without keys, pages of other sites must not ask through their visitor's browser. Raises Refusal 403.

    A site can have its own name lead to this address (DNS rebinding): then `Host` is that name.
    """
    for header, given in (
        ("Host", f"//{request.headers.get('host', bound)}"),
        ("Origin", request.headers.get("origin")),
    ):
        if given is not None and not _here(given, bound):
            words = f"This server has no keys and answers to this machine only: {header} is another's"
            raise Refusal(403, words, code="foreign_request")


def _here(url: str, bound: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name in ("localhost", bound) or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _act(route: Route, call: Call) -> Response:
    given = [call]
    if route.body is not None:
        given.append(decode(await read(call.request, BODY), route.body))
    if inspect.iscoroutinefunction(route.act):
        found = await route.act(*given)
    else:
        found = await asyncio.to_thread(route.act, *given)
    return found if isinstance(found, Response) else Response(msgspec.json.encode(found), media_type=JSON)


def _refused(refusal: Refusal, asked: str) -> Response:
    headers = {"x-request-id": asked, **refusal.headers}
    return Response(msgspec.json.encode(refusal.envelope()), refusal.status, headers, JSON)


# ---- what came


async def read(request: Request, most: int) -> bytes:
    """The body, of so many bytes at most. Packed ones are refused: nobody sends them, and a small one can become any size."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "Packed bodies are not taken: send it without Content-Encoding")
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > most:
            raise Refusal(413, f"The request is larger than {most} bytes")
    return bytes(found)


def decode(data: bytes, kind: Any) -> Any:
    """A JSON body as a request. Raises Refusal, which names the field."""
    try:
        try:
            return msgspec.json.decode(data or b"{}", type=kind)
        except msgspec.ValidationError as error:
            msgspec.json.decode(data or b"{}")  # what is said of a field is no help where the whole is no JSON
            raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal(400, "We could not parse the JSON body of your request") from None


def _invalid(message: str) -> Refusal:
    """msgspec's words as the protocol's."""
    what, _, place = message.partition(" - at `$")
    param = re.sub(r"^\.|`$|\[\.\.\.\]", "", place) or None
    if name := re.search(r"unknown field `(.*)`", what):
        where = f"{param}.{name[1]}" if param else name[1]
        return Refusal(400, f"Unrecognized request argument supplied: {where}", param=where)
    if name := re.search(r"missing required field `(.*)`", what):
        where = f"{param}.{name[1]}" if param else name[1]
        return Refusal(400, f"Missing required parameter: '{where}'", param=where, code="missing_required_parameter")
    return Refusal(400, f"Invalid value for '{param or 'body'}': {what}", param=param, code="invalid_value")


def _query(route: Route, request: Request) -> Any:
    if route.query is None:
        return None
    known = set(route.query.__struct_fields__)
    found: dict[str, Any] = {k: v for k, v in request.query_params.items() if k in known and k != "metadata"}
    if "metadata" in known:
        pairs = {k[9:-1]: v for k, v in request.query_params.multi_items() if re.fullmatch(r"metadata\[.*\]", k)}
        found["metadata"] = pairs
        found["without_metadata"] = request.query_params.get("metadata") == "null"
    try:
        return msgspec.convert(found, route.query, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def digest(value: Any) -> str:
    """What makes a request known again."""
    return hashlib.sha256(json.dumps(msgspec.to_builtins(value), sort_keys=True).encode()).hexdigest()


# ---- what it says of itself


def openapi(routes: list[Route]) -> dict[str, Any]:
    """The OpenAPI document of the routes."""
    kinds = [k for r in routes for k in (r.gives, r.body, r.query) if k is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema = dict(zip(map(id, kinds), schemas, strict=True))
    error = {"description": "an error", "content": {JSON: {"schema": {"$ref": "#/components/schemas/Envelope"}}}}
    paths: dict[str, Any] = {}
    for route in routes:
        about: dict[str, Any] = {
            "operationId": route.act.__name__,
            "responses": {"200": {"description": "ok"}, "default": error},
        }
        about["summary"] = (route.act.__doc__ or "").strip().partition("\n")[0]
        if route.gives is not None:
            about["responses"]["200"]["content"] = {JSON: {"schema": schema[id(route.gives)]}}
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)", route.path)
        ]
        if route.query is not None:
            fields = components[route.query.__name__]["properties"]
            parameters += [
                {
                    "name": name,
                    "in": "query",
                    "schema": fields[name],
                    **({"style": "deepObject"} if name == "metadata" else {}),
                }
                for name in fields
                if name != "without_metadata"
            ]
        if parameters:
            about["parameters"] = parameters
        if route.body is not None:
            about["requestBody"] = {"required": True, "content": {JSON: {"schema": schema[id(route.body)]}}}
        if route.form is not None:
            about["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": route.form}}}
        if route.open:
            about["security"] = []
        paths.setdefault(re.sub(r":path}", "}", f"/v1{route.path}"), {})[route.method.lower()] = about
    components["Envelope"] = ENVELOPE
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tunesmith", "version": "1", "description": "The OpenAI fine-tuning protocol"},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


_MAYBE = {"type": ["string", "null"]}
ENVELOPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _MAYBE, "code": _MAYBE},
        }
    },
}
