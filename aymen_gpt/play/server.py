"""The page and OpenAI's completions API (https://platform.openai.com/docs/api-reference/completions) over HTTP.

One thread computes; requests to one model stand in a line, those to several take turns token by token. When a
client goes away, its place in the line is free, or its text ends with the token that is being made. Only pages of
this server may ask: another Host (DNS rebinding) or Origin gets an error, and there are no CORS headers.
"""

import asyncio
import json
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from pydantic import BaseModel, Field, ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware

import aymen_gpt
from aymen_gpt.data import tokenizer
from aymen_gpt.errors import AymenError
from aymen_gpt.model.gpt import GPT
from aymen_gpt.play import models
from aymen_gpt.play.models import Delta, Models, Token

HERE = Path(__file__).parent
MOST_BYTES = 2**20  # of a request
MOST_TOKENS = 4096  # of one answer
MOST_ANSWERS = 64  # of one request: prompts times n
MOST_WAITING = 64  # requests in the line for one model
MOST_SHOWN = 256  # tokens of a text whose attention the page can show
TOP = 10  # alternatives of a token
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:"
)
T = TypeVar("T")


class Refusal(Exception):
    """An error in OpenAI's form: a status, a kind, and one line that says what to do."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


class Text(BaseModel):
    """A text to look into."""

    model: str
    text: str
    layer: int = Field(0, ge=0)
    head: int = Field(0, ge=0)


class Completion(BaseModel):
    """OpenAI's request, and top_k. What else it may say (best_of, user, ...) makes no difference here."""

    model: str
    prompt: str | list[str] | list[int] | list[list[int]] = "<|endoftext|>"
    max_tokens: int = Field(16, ge=0, le=MOST_TOKENS)
    temperature: float = Field(1.0, ge=0, le=1000, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    stream: bool = False
    logprobs: int | None = Field(None, ge=0, le=TOP)
    echo: bool = False
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)

    def stops(self) -> list[str]:
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [word for word in words if word]

    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt, at least one token each."""
        given = self.prompt
        texts: Any = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        return [prompt_ids(text) if isinstance(text, str) else text for text in texts]


def prompt_ids(text: str) -> list[int]:
    """The tokens of a prompt; of none, <|endoftext|>, behind which a text begins."""
    return [tokenizer.EOT] if text in ("", tokenizer.END_OF_TEXT) else tokenizer.encode(text).tolist()


class Line:
    """The requests that wait for one model, the first of which has it."""

    def __init__(self) -> None:
        self.tickets: list[object] = []
        self.moved = asyncio.Event()  # set, and replaced by a new one, whenever somebody leaves

    def check(self) -> None:
        """Refuse a request that would make the line too long."""
        if len(self.tickets) >= MOST_WAITING:
            raise Refusal(503, f"{len(self.tickets)} requests wait for this model: try again later", "busy")

    @contextmanager
    def place(self) -> Iterator[object]:
        """Stand in the line, and leave it at the end or when the client goes away (so nothing here may await)."""
        ticket = object()
        self.tickets.append(ticket)
        try:
            yield ticket
        finally:
            self.tickets.remove(ticket)
            self.moved.set()
            self.moved = asyncio.Event()

    async def ahead(self, ticket: object) -> AsyncIterator[int]:
        """How many are before, each time that changes, until none is."""
        while ahead := self.tickets.index(ticket):
            yield ahead
            while self.tickets.index(ticket) == ahead:
                await self.moved.wait()

    async def turn(self, ticket: object) -> None:
        """Wait until none is before."""
        async for _ in self.ahead(ticket):
            pass


class Engine:
    """Runs the models in one thread, for requests that wait in a line per model."""

    def __init__(self, served: Models) -> None:
        self.served = served
        self.lines: defaultdict[str, Line] = defaultdict(Line)
        self.thread, self.loading = ThreadPoolExecutor(1, "model"), asyncio.Lock()

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        """What a function of models.py gives."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    async def load(self, name: str) -> GPT:
        async with self.loading:
            return await asyncio.to_thread(self.served.load, name)

    async def deltas(self, answer: Iterator[Delta]) -> AsyncIterator[Delta]:
        try:
            while (delta := await self.compute(next, answer, None)) is not None:
                yield delta
        finally:
            self.thread.submit(answer.close)  # type: ignore[attr-defined]  # after the token that is being made

    def line(self, name: str) -> Line:
        """The line for a model that exists, if it is not too long."""
        self.served.find(name)
        line = self.lines[name]
        line.check()
        return line

    async def choices(self, asked: Completion, prompts: list[list[int]]) -> AsyncIterator[dict[str, Any]]:
        """The answers to a request, one after the other, piece by piece."""
        model = await self.load(asked.model)
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(asked.n)):
            async for piece in self.pieces(asked, model, prompt, index):
                yield piece

    async def pieces(
        self, asked: Completion, model: GPT, prompt: list[int], index: int
    ) -> AsyncIterator[dict[str, Any]]:
        """One answer, ``choices[index]`` of OpenAI's form."""
        top, offset = asked.logprobs or 0, 0
        if asked.echo:
            tokens = await self.compute(models.read, model, prompt, top)
            text = tokenizer.gpt2().decode(prompt)
            yield choice(index, Delta(text, tokens, "length"), asked.logprobs, 0, made=0)
            offset = len(text)
        elif not asked.max_tokens:
            yield choice(index, Delta("", [], "length"), asked.logprobs, 0, made=0)
        if not asked.max_tokens:
            return
        seed = (uuid.uuid4().int if asked.seed is None else asked.seed + index % asked.n) % 2**63
        answer = models.answer(
            model, prompt, asked.max_tokens, temperature=asked.temperature, top_k=asked.top_k,
            top_p=asked.top_p, seed=seed, stop=asked.stops(), top=top,
        )  # fmt: skip
        async for delta in self.deltas(answer):
            yield choice(index, delta, asked.logprobs, offset, made=len(delta.tokens))
            offset += len(delta.text)

    async def inspect(self, asked: Text) -> dict[str, Any]:
        """Of each token of a text its loss and likeliest alternatives, and the attention of one head."""
        c, model = self.served.config, await self.load(asked.model)
        every = [tokenizer.EOT, *tokenizer.encode(asked.text).tolist()]
        ids = every[: c.block_size]
        tokens = await self.compute(models.read, model, ids, TOP)
        weights = await self.compute(models.attention, model, ids[:MOST_SHOWN], asked.layer, asked.head)
        rounded = [[round(weight, 3) for weight in row] for row in weights]
        sizes = {"layers": c.n_layer, "heads": c.n_head, "cut": len(ids) < len(every)}
        return {"logprobs": as_logprobs(tokens, 0), "attention": rounded} | sizes


def app(served: Models, *, hosts: list[str], curves: Callable[[], str]) -> FastAPI:
    """The server of some models, for the Host names in ``hosts``; ``curves`` draws SVG for the page."""
    api = FastAPI(
        title="Aymen-GPT", version=aymen_gpt.__version__, dependencies=[Depends(own_page)], docs_url=None
    )
    api.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    engine, c = Engine(served), served.config

    @api.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status)

    @api.exception_handler(AymenError)
    async def failed(request: Request, error: AymenError) -> JSONResponse:
        return JSONResponse(Refusal(404, str(error), "model_not_found").body(), 404)

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        owner = {"object": "model", "created": 0, "owned_by": "aymen-gpt"}
        return {"object": "list", "data": [{"id": name} | owner for name in served.names()]}

    @api.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = await read_body(request, Completion)
        prompts = asked.prompts()
        if not prompts or len(prompts) * asked.n > MOST_ANSWERS:
            raise Refusal(400, f"{len(prompts)} prompts x n = {asked.n}: 1 to {MOST_ANSWERS} answers a request")
        for prompt in prompts:
            check_ids(prompt, c.block_size)
        line = engine.line(asked.model)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head |= {"model": asked.model}
        if asked.stream:
            pieces = events(line, lambda: engine.choices(asked, prompts), head)
            return StreamingResponse(pieces, media_type="text/event-stream")
        found: dict[int, dict[str, Any]] = {}
        with line.place() as ticket:
            await line.turn(ticket)
            async for part in engine.choices(asked, prompts):
                join(found, part)
                if await request.is_disconnected():
                    return Response(status_code=499)
        n_prompt = sum(map(len, prompts))
        n_made = sum(choice.pop("made") for choice in found.values())
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_made, "total_tokens": n_prompt + n_made}
        return JSONResponse(head | {"choices": list(found.values()), "usage": usage})

    @api.post("/api/inspect")
    async def inspect(request: Request) -> dict[str, Any]:
        asked = await read_body(request, Text)
        line = engine.line(asked.model)
        if asked.layer >= c.n_layer or asked.head >= c.n_head:
            raise Refusal(400, f"this model has layers 0 to {c.n_layer - 1} and heads 0 to {c.n_head - 1}")
        with line.place() as ticket:
            await line.turn(ticket)
            return await engine.inspect(asked)

    @api.get("/api/state")
    async def state() -> dict[str, Any]:
        waiting = {name: len(line.tickets) for name, line in engine.lines.items() if line.tickets}
        return {"name": served.name, "steps": served.steps(), "waiting": waiting}

    @api.get("/")
    async def page() -> HTMLResponse:
        environment = Environment(loader=FileSystemLoader(HERE), autoescape=True)
        drawn = Markup(await asyncio.to_thread(curves))
        text = environment.get_template("page.html.j2").render(name=served.name, curves=drawn)
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"})

    @api.get("/play.js")
    async def script() -> FileResponse:
        return FileResponse(HERE / "play.js")

    @api.get("/play.css")
    async def style() -> Response:
        css = [path.read_text("utf-8") for path in (HERE.parent / "reporting" / "page.css", HERE / "play.css")]
        return Response("".join(css), media_type="text/css")

    return api


def own_page(request: Request) -> None:
    """Refuse what a page of another origin asks for; programs send no Origin."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise Refusal(403, f"a page of {origin[:200]} may not ask this server")


B = TypeVar("B", bound=BaseModel)


async def read_body(request: Request, kind: type[B]) -> B:
    """The JSON of a request; 413 beyond MOST_BYTES, 400 with the first thing that is wrong with it."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise Refusal(413, f"a request may have {MOST_BYTES:,} bytes")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        raise Refusal(400, f"{place}: {first['msg']}" if place else first["msg"]) from None


def check_ids(ids: list[int], most: int) -> None:
    if not ids or min(ids) < 0 or max(ids) >= tokenizer.VOCAB_SIZE:
        raise Refusal(400, f"a prompt is one token or more, each 0 to {tokenizer.VOCAB_SIZE - 1}")
    if len(ids) > most:
        raise Refusal(
            400, f"the prompt has {len(ids):,} tokens, the model reads {most:,}", "context_length_exceeded"
        )


async def events(
    line: Line, choices: Callable[[], AsyncIterator[Any]], head: dict[str, Any]
) -> AsyncIterator[str]:
    """Server-sent events: comments while others are before this request, then the pieces of the answer."""
    try:
        with line.place() as ticket:
            async for ahead in line.ahead(ticket):
                yield f": {ahead} before this request\n\n"
            async for part in choices():
                part.pop("made")
                yield f"data: {json.dumps(head | {'choices': [part]})}\n\n"
    except Refusal as refusal:
        yield f"data: {json.dumps(refusal.body())}\n\n"
    except AymenError as error:
        yield f"data: {json.dumps(Refusal(500, str(error)).body())}\n\n"
    yield "data: [DONE]\n\n"


def choice(index: int, delta: Delta, logprobs: int | None, offset: int, *, made: int) -> dict[str, Any]:
    """A piece of an answer in OpenAI's form, and how many of its tokens the model drew."""
    told = None if logprobs is None else as_logprobs(delta.tokens, offset)
    return {"index": index, "text": delta.text, "logprobs": told, "finish_reason": delta.finish, "made": made}


def as_logprobs(tokens: list[Token], offset: int) -> dict[str, list[Any]]:
    """OpenAI's form, and what it lacks: ids, and the alternatives (id, text, logprob) in their order."""
    texts = [models.piece(token.id) for token in tokens]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    top = [{models.piece(id): value for id, value in token.top} if token.top else None for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top,
        "text_offset": offsets,
        "token_ids": [token.id for token in tokens],
        "alternatives": [[(id, models.piece(id), value) for id, value in token.top] for token in tokens],
    }


def join(found: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a piece of an answer to what there is of it."""
    whole = found.setdefault(part["index"], part)
    if whole is part:
        return
    for key in ("text", "made"):
        whole[key] += part[key]
    whole["finish_reason"] = part["finish_reason"]
    for key, values in (part["logprobs"] or {}).items():
        whole["logprobs"][key] += values
