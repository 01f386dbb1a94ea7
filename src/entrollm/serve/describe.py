"""The description of the API, as OpenAPI has it."""

from __future__ import annotations

import functools
import importlib.metadata

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from entrollm.serve.answers import Json
from entrollm.serve.chat_fields import ChatRequest
from entrollm.serve.fields import CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from entrollm.serve.responses_fields import ResponsesRequest

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_GETS = ("/", "/v1/models", "/v1/models/{name}", "/health", "/metrics")
_SCHEMAS = "#/components/schemas/"
_ERROR_SCHEMA: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@functools.cache
def describe() -> Json:
    """The paths, the bodies that they take and the errors of all of them."""
    references, definitions = models_json_schema(
        [(kind, "validation") for kind in _BODIES.values()], ref_template=_SCHEMAS + "{model}"
    )
    failed = {"description": "Error", "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Error"}}}}
    responses = {"200": {"description": "Answer"}, "4XX": failed, "5XX": failed}
    paths: dict[str, Json] = {}
    for path, kind in _BODIES.items():
        content = {"application/json": {"schema": references[kind, "validation"]}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": responses}}
    for path in _GETS:
        get: Json = {"responses": responses}
        if "{name}" in path:
            get["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": get}
    return {
        "openapi": "3.1.0",
        "info": {"title": "EntroLLM", "version": importlib.metadata.version("entrollm")},
        "paths": paths,
        "components": {"schemas": {**definitions.get("$defs", {}), "Error": _ERROR_SCHEMA}},
    }
