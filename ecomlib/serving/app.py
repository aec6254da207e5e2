"""The service over HTTP. Thin: what a request means is in ``service``, what it does in ``engine``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from .. import __version__
from .engine import OpenDecision
from .service import AlreadyAnswered, Busy, Service, UnknownDecision, UnknownTask

STATUS = {
    OpenDecision: 409,
    AlreadyAnswered: 409,
    UnknownDecision: 404,
    UnknownTask: 404,
    ValueError: 422,
    Busy: 503,
    OSError: 503,
}
"""Error -> HTTP status; the first that fits."""


class DecideRequest(BaseModel):
    """What is known in the morning."""

    model_config = ConfigDict(extra="forbid", strict=True)
    task: str = Field(description="name of the product, 1 to 200 characters", examples=["sku-1"])
    unit_cost: float = Field(description="in units of the average unit cost", examples=[1.3])


class FeedbackRequest(BaseModel):
    """What is known in the evening."""

    model_config = ConfigDict(extra="forbid", strict=True)
    decision: str = Field(description="id of the decision")
    units: int = Field(description="units sold at its price", examples=[12])


class ActivateRequest(BaseModel):
    """Which model is to answer."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str


def create_app(service: Service) -> FastAPI:
    """``POST /decide``, ``POST /feedback``, ``GET /tasks/{task}``, ``GET /health``, ``POST /activate``,
    ``POST /rollback``. Errors are ``{"error": what was wrong and what is allowed}`` with a status of 400 or above; that
    of a second decision also names the ``open`` one. Endless bodies, users and encryption are a proxy's business."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.store.close()

    app = FastAPI(title="ecomlib", version=__version__, lifespan=lifespan)

    # Plain functions: FastAPI runs them on threads, and a commit to disk blocks none but its own.
    @app.post("/decide")
    def decide(request: DecideRequest) -> dict[str, Any]:
        return service.decide(request.task, request.unit_cost)

    @app.post("/feedback")
    def feedback(request: FeedbackRequest) -> dict[str, Any]:
        return service.feedback(request.decision, request.units)

    @app.get("/tasks/{task:path}")
    def task(task: str) -> dict[str, Any]:
        return service.task(task)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return service.health()

    @app.post("/activate")
    def activate(request: ActivateRequest) -> dict[str, Any]:
        return {"model": service.activate(request.model)}

    @app.post("/rollback")
    def rollback() -> dict[str, Any]:
        return {"model": service.rollback()}

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
        body: dict[str, Any] = {"error": str(error)}
        if isinstance(error, OpenDecision):
            body["open"] = error.decision._asdict()
        return JSONResponse(body, status)

    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        described = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"][1:]) or "body"
            shown = "" if problem["type"] in ("missing", "json_invalid") else f" = {problem['input']!r:.80}"
            described.append(f"{name}{shown}: {problem['msg']}")
        return JSONResponse({"error": "; ".join(described)}, 422)

    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)

    app.add_exception_handler(HTTPException, elsewhere)
    for kind in (ValueError, Busy, OSError):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(RequestValidationError, malformed)
    return app
