"""Requests and responses of the server: OpenAI's embeddings, and what this project adds to them."""

import base64
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from verl.encoder.record import EncodedText
from verl.encoder.vector_format import VectorFormat
from verl.text_roles import Role

MOST_INPUTS = 2048
_TOKEN_IDS = (
    "input holds token ids, which belong to another model's tokenizer; send texts. LangChain sends ids unless it is "
    "given OpenAIEmbeddings(..., check_embedding_ctx_length=False)"
)


def read_input(given: Any) -> list[str]:
    """The texts of a request's `input`.

    Raises:
        ValueError: it is neither a string nor a list of strings, or a text is missing; the message has its index.
    """
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list):
        raise ValueError("input must be a string or a list of strings")
    if not 1 <= len(texts) <= MOST_INPUTS:
        raise ValueError(f"input has {len(texts)} texts; 1 to {MOST_INPUTS} are taken in one request")
    for index, text in enumerate(texts):
        if isinstance(text, (int, list)) and not isinstance(text, bool):
            raise ValueError(_TOKEN_IDS)
        if not isinstance(text, str):
            raise ValueError(f"input[{index}] must be a string")
        if not text:
            raise ValueError(f"input[{index}] is empty; leave it out")
    return texts


class EmbeddingsRequest(BaseModel):
    """Body of `POST /v1/embeddings`. The first five fields are OpenAI's, the others are this server's."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """A name of `GET /v1/models`."""
    input: Annotated[list[str], PlainValidator(read_input, json_schema_input_type=str | list[str])]
    """One text, or 1 to 2048; none is empty. No token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """float, the default: a list of numbers; base64: the bytes of little-endian float32."""
    dimensions: int | None = Field(None, ge=1)
    """Keep the first dimensions and bring them back to unit length; null = all."""
    user: str | None = None
    """Accepted and not used."""
    think: bool | None = None
    """Whether the model writes a rationale, which the embedding covers; null = as the server was started (not with
    --no_thinking), and as the model's settings say for the input_type."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Most tokens of a rationale; null = the server's, which is also the most."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Of the sampling of rationales; equal requests with equal seeds get equal vectors."""
    return_rationales: bool = False
    """Return the rationale of each text as `data[i].rationale`."""
    input_type: Role | None = None
    """The prompt, thinking and token limit that the model's settings have for queries or documents; null = those of
    texts that are neither."""
    task: str | None = None
    """Name of one of the instructions in the model's settings, for prompts that have a place for it."""


class Embedding(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["embedding"]
    index: int
    """Of the text in `input`."""
    embedding: list[float] | str
    """Of unit length; a base64 string if that was asked for."""
    shortened: bool
    """Whether the text was cut to fit the model's max_prompt_length."""
    rationale: str | None = None
    """Only with return_rationales; empty without thinking."""


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class TokenUsage(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    prompt_tokens: int
    """Of the rendered prompts; a text that is given twice counts twice."""
    completion_tokens: int
    """Of the rationales."""
    completion_tokens_details: CompletionTokensDetails
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Answer to `POST /v1/embeddings`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: TokenUsage
    revision: str
    """SHA-256 of the weights and config.json."""
    settings: dict[str, Any]
    """All that decides the vectors besides texts and weights."""


class Model(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time at which the server was started."""
    owned_by: str = "grace"
    revision: str
    """SHA-256 of the weights and config.json."""
    embedding_dim: int
    max_prompt_length: int
    """Tokens of a prompt; longer texts are cut to fit."""
    max_new_tokens: int
    """Most tokens of a rationale, and their number where a request gives none."""


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


State = Literal["loading", "ok", "draining", "failed"]


class Health(BaseModel):
    """Answer to `GET /health`; 200 if ok, otherwise 503."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    status: State
    message: str
    """What that means for who watches the server."""


def response_body(
    request: EmbeddingsRequest, encoded: Sequence[EncodedText], settings: dict[str, Any], revision: str
) -> bytes:
    """An `EmbeddingsResponse` as JSON.

    Args:
        encoded: of each text of the request, in order.
    """
    form = VectorFormat(normalize=True, truncate_dim=request.dimensions, precision="float32", int8_ranges=None,
                        as_tensor=False)  # fmt: skip
    vectors = np.asarray(form.apply(np.stack([text.mean for text in encoded])), "<f4")
    shown: Iterable[Any] = vectors
    if request.encoding_format == "base64":
        shown = (base64.b64encode(vector.tobytes()).decode() for vector in vectors)
    data = [
        {"object": "embedding", "index": index, "embedding": vector, "shortened": text.shortened,
         **({"rationale": text.rationale} if request.return_rationales else {})}
        for index, (text, vector) in enumerate(zip(encoded, shown, strict=True))
    ]  # fmt: skip
    body = {"object": "list", "data": data, "model": request.model, "usage": _usage(encoded), "revision": revision,
            "settings": settings}  # fmt: skip
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _usage(encoded: Sequence[EncodedText]) -> dict[str, Any]:
    prompts, rationales = (sum(text.prompt_tokens for text in encoded), sum(text.rationale_tokens for text in encoded))
    return {
        "prompt_tokens": prompts,
        "completion_tokens": rationales,
        "completion_tokens_details": {"reasoning_tokens": rationales},
        "total_tokens": prompts + rationales,
    }
