"""Reward servers for callers on the network: the HTTP face of a `RewardPool`.

Owns what a request may be (token, size, fields) and which answer means what. One bad request harms nobody else's: it is refused
before any server sees it. Does not know who judges. What a connection may take is bounded in `connections`. `rlhf reward serve`
(`commands.serve`) runs it; `remote` is its client.

    POST /judge   {"prompt" or "messages", "responses": [...], "payload": {...}}  ->  outcomes, preferences, measures, fingerprint
    GET  /health  200 while a server answers, else 503
    GET  /info    kind, compares, fingerprint, servers, version
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rlhf import __version__
from rlhf.config import Settings
from rlhf.reward.errors import Busy, NoServerLeft, TooMany
from rlhf.reward.judges.wire import TOKEN, feedback_to_json
from rlhf.reward.serving.connections import Bounds, allow_files
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Prompt, Turn, content_id

MAX_BODY_BYTES = 8 * 2**20
MAX_RESPONSES = 1024
TOO_LARGE = f"the request is larger than {MAX_BODY_BYTES // 2**20} MiB; ask about fewer responses at once"
RETRY_AFTER_S = 1
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than askers pause, who else may ask on one that is being closed."""


class Message(BaseModel):
    """One turn of a conversation; a chat template may know further fields (`tool_calls`, ...)."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(min_length=1)
    content: str


class Question(BaseModel):
    """The body of POST /judge."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = ""
    messages: list[Message] = []
    responses: list[str] = Field(min_length=1, max_length=MAX_RESPONSES)
    payload: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_prompt(self) -> Question:
        if self.prompt and self.messages:
            raise ValueError("has `prompt` and `messages`; give one of them")
        return self

    def as_prompt(self) -> Prompt:
        """Without tokens."""
        if not self.messages:
            return Prompt(content_id(self.prompt), (), self.prompt, self.payload)
        turns = tuple(Turn.of(message.model_dump()) for message in self.messages)
        return Prompt(content_id(turns), (), turns[-1].content, self.payload, conversation=turns)


def make_app(pool: RewardPool, settings: Settings, token: str) -> FastAPI:
    """The service, for any ASGI server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, token=token)
    reward = settings.reward
    fingerprint = pool.infos[0].fingerprint

    async def judge(request: Request) -> JSONResponse:
        # Taken for JSON whatever its header says: curl's says that it is a form.
        question = Question.model_validate_json(await request.body())
        feedback = await pool.judge_texts(question.as_prompt(), question.responses)
        return JSONResponse({"fingerprint": fingerprint, **feedback_to_json(feedback)})

    # Without FastAPI's work on parameters: there are none, and it takes time.
    app.add_route("/judge", judge, ["POST"])

    @app.get("/health")
    async def health() -> JSONResponse:
        servers = {name: None if one is None else asdict(one) for name, one in (await pool.health()).items()}
        healthy = any(one is not None for one in servers.values())
        return JSONResponse({"healthy": healthy, "servers": servers}, 200 if healthy else 503)

    @app.get("/info")
    async def info() -> JSONResponse:
        return JSONResponse(
            {
                "kind": reward.kind,
                "compares": reward.compares,
                "fingerprint": fingerprint,
                "servers": reward.servers,
                "version": __version__,
            }
        )

    @app.exception_handler(ValidationError)
    async def malformed(request: Request, error: ValidationError) -> JSONResponse:
        return _refusal(422, "; ".join(_in_words(finding) for finding in error.errors(include_input=False)))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, str(error.detail))

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> JSONResponse:
        return _refusal(400, "the body did not arrive")  # to nobody

    @app.exception_handler(TooMany)
    async def too_many(request: Request, error: TooMany) -> JSONResponse:
        return _refusal(413, str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return _refusal(429, f"{error}; send it again later", RETRY_AFTER_S)

    @app.exception_handler(NoServerLeft)
    async def gone(request: Request, error: NoServerLeft) -> JSONResponse:
        return _refusal(503, str(error))

    return app


class Gate:
    """ASGI middleware: no token, no entry; and no body beyond the limit. Nothing of a refused request is read, and its connection is
    closed."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: str):
        self._app, self._wanted = app, f"Bearer {token}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # In constant time: how long the comparison takes must not tell how much of a guess was right.
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._wanted):
            words = f"the header `Authorization: Bearer TOKEN` is missing or wrong; the token is this service's {TOKEN}"
            await _refusal(401, words)(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            await _refusal(413, TOO_LARGE)(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:  # sent in chunks, without a length
                raise HTTPException(413, TOO_LARGE)
            return message

        await self._app(scope, counted, send)


def _refusal(status: int, words: str, retry_after_s: int | None = None) -> JSONResponse:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (401, 413):
        headers["Connection"] = "close"  # the rest of the request is not waited for
    return JSONResponse({"error": words}, status, headers)


def _in_words(finding: Mapping[str, Any]) -> str:
    """One of pydantic's findings, without the value itself, which may be long."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in finding["loc"]).lstrip(".")
    if finding["type"] == "json_invalid":
        return "the body is not valid JSON"
    if finding["type"] == "value_error":
        return f"the body {finding['ctx']['error']}"
    return f"`{place}`: {finding['msg']}" if place else f"the body must be a JSON object: {finding['msg']}"


def server_config(app: FastAPI, bounds: Bounds | None = None) -> uvicorn.Config:
    """How the service is served. Only errors are logged: what anybody may send must not fill a disk."""
    bounds = bounds or Bounds()
    bounds = replace(bounds, connections=allow_files(bounds))
    return uvicorn.Config(
        app,
        http=bounds.protocol(),
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_level="error",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
