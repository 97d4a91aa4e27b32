"""The paths of the server: what is checked before a request's texts wait, and what it is told."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from verl.encoder.grace_encoder import GraceEncoder
from verl.encoder.record import EncodedText
from verl.errors import UserError
from verl.serve.access import Access
from verl.serve.batching import EndedError, Job, Options, QueueFullError, UnfitTextError
from verl.serve.bodies import Bodies, ClientGoneError
from verl.serve.errors import ApiError, explain_body, install_handlers
from verl.serve.messages import EmbeddingsRequest, EmbeddingsResponse, Health, Model, ModelList, response_body
from verl.serve.metrics import Metrics
from verl.serve.worker import Worker

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}  # fmt: skip
# A text has at most this many characters for each token of the longest prompt; what a prompt has no room for is cut.
_CHARS_PER_TOKEN = 100
_MESSAGES = {
    "ok": "ready",
    "loading": "the model is being loaded",
    "draining": "the server ends: it finishes what waits and takes nothing new",
    "failed": "the model was not loaded, or its engine died; the server's log names the way out",
}
_RETRY_S = {"ok": 5, "loading": 5, "draining": 30, "failed": 60}
# Nobody reads it: the client has gone. Nginx's number, for the metrics.
_GONE = 499


@dataclass
class Service:
    """What the paths share."""

    name: str
    """Of the model, as clients give it."""
    thinks: bool
    """Whether a request that does not say gets rationales."""
    worker: Worker
    access: Access
    metrics: Metrics
    bodies: Bodies = field(default_factory=Bodies)
    started: int = field(default_factory=lambda: int(time.time()))

    def ready_encoder(self) -> GraceEncoder:
        """The encoder, to read its settings and sizes.

        Raises:
            ApiError: 503; it is not loaded yet, or does not work any more.
        """
        encoder = self.worker.encoder
        if self.worker.state != "ok" or encoder is None:
            raise unavailable(self.worker)
        return encoder


def unavailable(worker: Worker) -> ApiError:
    """A 503 that says why."""
    state = worker.state
    return ApiError(503, _MESSAGES[state], code=f"server_{state}", retry_after=_RETRY_S[state])


def create_app(service: Service) -> FastAPI:
    """The paths of a service. Its worker is started, or will be; until then they answer 503."""
    app = FastAPI(
        title="GRACE embeddings", version="1", docs_url=None, redoc_url=None,
        description="Text embeddings through rationales, in OpenAI's form. Errors are "
        '`{"error": {"message", "type", "param", "code"}}`.',
    )  # fmt: skip
    install_handlers(app)
    service.metrics.ready.set_function(lambda: service.worker.state == "ok")
    guarded = [Depends(service.access.check)]
    body = {"required": True, "content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}}}

    @app.post(
        "/v1/embeddings", response_model=EmbeddingsResponse, dependencies=guarded, openapi_extra={"requestBody": body}
    )
    async def embeddings(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await _answer(service, request)
        except ApiError as error:
            response = error.response()
        except ClientGoneError:
            service.metrics.gone.inc()
            return Response(status_code=_GONE)
        service.metrics.requests.labels(response.status_code).inc()
        service.metrics.seconds.observe(time.perf_counter() - started)
        return response

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> ModelList:
        encoder = service.ready_encoder()
        settings = encoder.settings
        model = Model(
            id=service.name, created=service.started, revision=encoder.revision, embedding_dim=encoder.embedding_dim,
            max_prompt_length=settings.max_prompt_length, max_new_tokens=settings.max_new_tokens,
        )  # fmt: skip
        return ModelList(data=[model])

    @app.get("/health", responses={503: {"model": Health}})
    async def health() -> JSONResponse:
        state = service.worker.state
        found = Health(status=state, message=_MESSAGES[state])
        return JSONResponse(found.model_dump(), 200 if state == "ok" else 503)

    @app.get("/metrics", dependencies=guarded, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for path, (name, kind) in _PAGE.items():
        _add_file(app, path, name, kind)
    return app


async def _answer(service: Service, request: Request) -> Response:
    """Embed what a request asks for."""
    encoder = service.ready_encoder()
    async with service.bodies.read(request) as body:
        try:
            wanted = EmbeddingsRequest.model_validate_json(body)
        except ValidationError as error:
            raise explain_body(error, EmbeddingsRequest.model_fields) from None
        options = _options(service, encoder, wanted)
        settings = _describe(encoder, options)
        job = Job(wanted.input, options)
        _put(service.worker, job)
        found = await _until_done(service.worker, request, job)
        content = response_body(wanted, found, settings, encoder.revision)
        return Response(content, media_type="application/json")


def _options(service: Service, encoder: GraceEncoder, wanted: EmbeddingsRequest) -> Options:
    """Check what only the loaded model can tell, and fill in what the request leaves open."""
    settings = encoder.settings
    if wanted.model != service.name:
        raise ApiError(404, f"this server has the model {service.name!r}", param="model", code="model_not_found")
    if wanted.dimensions is not None and wanted.dimensions > encoder.embedding_dim:
        raise ApiError(
            400, f"dimensions must be at most the model's {encoder.embedding_dim}", param="dimensions",
            code="too_many_dimensions",
        )  # fmt: skip
    encoder.warn_of_untrained(wanted.dimensions)
    most = _CHARS_PER_TOKEN * settings.max_prompt_length
    for index, text in enumerate(wanted.input):
        if len(text) > most:
            raise ApiError(
                400, f"input[{index}] has {len(text)} characters, and {most} are taken; the model reads at most "
                f"{settings.max_prompt_length} tokens of a text: split it", param="input", code="text_too_long",
            )  # fmt: skip
    role = settings.of_role(wanted.input_type)
    limit = wanted.max_new_tokens or role.max_new_tokens
    if limit > settings.longest_rationale:
        raise ApiError(
            400, f"max_new_tokens must be at most the server's {settings.longest_rationale}", param="max_new_tokens",
            code="too_many_tokens",
        )  # fmt: skip
    if wanted.task is not None and wanted.task not in settings.instructions:
        known = ", ".join(sorted(settings.instructions)) or "none"
        raise ApiError(400, f"task must be one of the model's instructions: {known}", param="task", code="unknown_task")
    thinks = (service.thinks and role.think) if wanted.think is None else wanted.think
    if not thinks and settings.span == "rationale":
        raise ApiError(400, "the model's settings pool the rationale alone; it needs think=true", param="think")
    sampling = (limit, wanted.seed) if thinks else (0, 0)
    return Options(thinks, *sampling, wanted.input_type, wanted.task)


def _describe(encoder: GraceEncoder, options: Options) -> dict[str, Any]:
    try:
        return encoder.describe(**options.arguments())
    except UserError as error:
        # Prompt and rationale together are too long for the model, or its centre is not of such vectors.
        raise ApiError(400, str(error), param="max_new_tokens" if options.max_new_tokens else "think") from None


def _put(worker: Worker, job: Job) -> None:
    try:
        worker.queue.put(job)
    except QueueFullError:
        raise ApiError(
            429, f"{len(worker.queue)} texts wait, and {worker.queue.most_texts} may; come again later",
            code="server_busy", retry_after=worker.seconds_of_queue(),
        ) from None  # fmt: skip
    except EndedError:
        raise unavailable(worker) from None


async def _until_done(worker: Worker, request: Request, job: Job) -> list[EncodedText]:
    """The result of a request that waits; what has not begun is dropped when its client goes away."""
    done = asyncio.wrap_future(job.done)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientGoneError
        return done.result()
    except UnfitTextError as error:
        raise ApiError(
            400, f"input[{error.index}] does not fit the model's max_prompt_length, and its settings say truncation="
            "error: shorten it", param="input", code="text_too_long",
        ) from None  # fmt: skip
    except EndedError:
        raise unavailable(worker) from None
    finally:
        gone.cancel()
        done.cancel()
        worker.queue.forget(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_file(app: FastAPI, path: str, name: str, kind: str) -> None:
    content = (Path(__file__).parent / "page" / name).read_bytes()

    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)
