"""For those who watch over the server: whether it is well, and its figures for Prometheus."""

from __future__ import annotations

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from tunesmith.server.app import Call, Route
from tunesmith.server.protocol import Refusal


class Health(msgspec.Struct):
    status: str


async def health(call: Call) -> Health | Response:
    """Whether new work is taken: 503 while the server ends. Waits for no thread."""
    if call.service.draining:
        return Response(msgspec.json.encode(Health("draining")), 503, media_type="application/json")
    return Health("ok")


def metrics(call: Call) -> Response:
    """Figures for Prometheus; where there are keys, for an administrator's."""
    if not call.caller.admin:
        raise Refusal(403, "The figures are for an administrator's key", code="insufficient_permissions")
    call.service.count_jobs()
    return Response(generate_latest(call.service.registry), media_type=CONTENT_TYPE_LATEST)


ROUTES = [Route("GET", "/health", health, Health, open=True), Route("GET", "/metrics", metrics)]
