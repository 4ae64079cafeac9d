"""How the server is: health, readiness, version, metrics, load; and its tokenizer."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.given import ids_of
from makeready.engine.protocol.asked import Ask, check_template, tools_of
from makeready.engine.protocol.schema import IDS, body_schema
from makeready.engine.server.access import Access
from makeready.engine.server.facts import load_of
from makeready.engine.server.problem import STARTING_SECONDS, ServeError
from makeready.engine.server.route import Answer, Exchange, Route, answer
from makeready.engine.server.routes.openai import shape
from makeready.engine.tools import FIELDS as TOOLS

_OPEN = ("GET",)


async def _health(exchange: Exchange) -> Answer:
    """Whether the engine gives signs of life; says nothing of how much there is to do."""
    if not exchange.service.healthy:
        raise ServeError(503, "the engine gives no sign of life", retry_seconds=STARTING_SECONDS)
    return Answer(b"", type="text/plain")


async def _ready(exchange: Exchange) -> Answer:
    """Whether requests are taken: not where the server is about to end."""
    if not exchange.service.ready:
        raise ServeError(503, "the server takes no requests", retry_seconds=STARTING_SECONDS)
    return Answer(b"", type="text/plain")


async def _health_generate(exchange: Exchange) -> Answer:
    """Whether a token can be generated."""
    service = exchange.service
    token = (service.front.end_ids or (0,))[0]
    sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    running = await exchange.start(Ask("token_ids", ([token],), sampling))
    await running.all()
    return Answer(b"", type="text/plain")


async def _version(exchange: Exchange) -> Answer:
    return answer({"version": version("makeready")})


async def _metrics(exchange: Exchange) -> Answer:
    client = exchange.service.client
    if client.last is not None:  # before there is nothing to tell
        exchange.service.metrics.now(client.waiting, client.running, client.pages)
    body, kind = exchange.service.metrics.render(exchange.headers.get("accept", ""))
    return Answer(body, type=kind)


async def _loads(exchange: Exchange) -> Answer:
    return answer({"loads": [load_of(exchange.service)]})


async def _tokenize(exchange: Exchange) -> Answer:
    """Token ids of ``prompt`` or of ``messages``; names are vLLM's."""
    body, front = exchange.json(), exchange.service.front
    exchange.ignore([name for name in body if name not in _TOKENIZE])
    if ("prompt" in body) == ("messages" in body):
        raise ServeError(400, "give either prompt or messages")
    special = body.get("add_special_tokens")
    if "messages" in body:
        template = {**exchange.service.settings.template, **(body.get("chat_template_kwargs") or {})}
        check_template(template)
        template |= tools_of(body, "messages", template)
        special = bool(special)
        ids, _ = await exchange.service.apart(lambda: front.rendered(body["messages"], special, **template))
    else:
        prompt = body["prompt"]
        if not isinstance(prompt, str):
            raise ServeError(400, "prompt must be a string", "prompt")
        ids = await exchange.service.apart(lambda: front.encode(prompt, special is not False))
    most = exchange.service.loaded.limits.context_len
    made: dict[str, Any] = {"count": len(ids), "max_model_len": most, "tokens": ids}
    if body.get("return_token_strs"):
        tokenizer = front.tokenizer_for("return_token_strs")
        made["token_strs"] = [tokenizer.id_to_token(token) for token in ids]
    return answer(made)


_TOKENIZE = frozenset(
    ("model", "prompt", "messages", "add_special_tokens", "chat_template_kwargs", "return_token_strs", *TOOLS)
)


async def _detokenize(exchange: Exchange) -> Answer:
    """The text of ``tokens``, special ones too; a list of lists gives a list of texts, as in SGLang."""
    body, front = exchange.json(), exchange.service.front
    exchange.ignore([name for name in body if name not in ("model", "tokens", "skip_special_tokens")])
    tokens, skip = body.get("tokens"), body.get("skip_special_tokens") is True
    tokenizer, vocabulary = front.tokenizer_for("detokenize"), exchange.service.loaded.vocabulary
    if tokens == []:
        return answer({"prompt": "", "text": ""})
    try:
        several = isinstance(tokens, list) and all(isinstance(each, list) for each in tokens)
        lists = [ids_of(each, vocabulary) for each in (tokens if several else [tokens])]  # type: ignore[union-attr]
    except RequestError as error:
        raise ServeError(400, f"tokens: {error}", "tokens") from None
    texts = [tokenizer.decode(ids, skip_special_tokens=skip) for ids in lists]
    made = texts if several else texts[0]
    return answer({"prompt": made, "text": made})


ROUTES = [
    Route("/health", _health, shape, _OPEN, Access.FREE),
    Route("/ping", _health, shape, ("GET", "POST"), Access.FREE),
    Route("/ready", _ready, shape, _OPEN, Access.FREE),
    Route("/health_generate", _health_generate, shape, _OPEN),
    Route("/version", _version, shape, _OPEN),
    Route("/metrics", _metrics, shape, _OPEN),
    Route("/v1/loads", _loads, shape, _OPEN),
    *(
        Route(path, _tokenize, shape, body=body_schema(sorted(_TOKENIZE)))
        for path in ("/tokenize", "/v1/tokenize")
    ),
    *(
        Route(path, _detokenize, shape, body=body_schema(("skip_special_tokens",), tokens=IDS))
        for path in ("/detokenize", "/v1/detokenize")
    ),
]
