"""Responses of the HTTP server: the engine's answers and drawings, whole or as a stream of events."""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .api_metrics import Metrics
from .api_requests import APIError, ChatRequest, ImageRequest, Pictures, TextOptions
from .drawing_unitok import image_generation
from .inference import answer_ids, has_text_tower, picture_bytes, text_tower_inputs
from .ranking_unitok import check_ranking
from .scoring_unitok import UniTokScores
from .serving import QueueFull, UniTokEngine
from .shared_engine import SharedEngine, Stream, cancel, submit


MAX_TOKENS = 256  # default length of an answer, if the slot has room for it
CHOICES_AT_ONCE = 16  # answers in a batch that is scored, each with a copy of the prompt's keys and values


class Service(SharedEngine):
    """The engine and the model as the endpoints use them.

    Args:
        engine: engine of the model.
        processor: processor of the same model.
        name: name of the model in the API.
        url_hosts: hosts from which pictures may be fetched, see `fetch`.
    """

    def __init__(self, engine: UniTokEngine, processor, name: str, url_hosts: Collection[str]):
        super().__init__(engine, processor)
        self.name, self.url_hosts = name, url_hosts
        self.metrics, self.created = Metrics(engine), int(time.time())
        self._scorer, self._scored = ThreadPoolExecutor(1, "scorer"), []
        config = self.model.config.visual_config.vision_config
        self.size = f"{config.image_size}x{config.image_size}"

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise APIError(404, f"there is no model {name!r}, only {self.name!r}", "model")

    def conversation(self, messages: list[dict]) -> list[dict]:
        """Convert the API's messages to the processor's conversation, with decoded pictures.

        Raises:
            APIError: a message or one of its parts is malformed, or a picture is unusable.
        """
        pictures, turns = Pictures(self.url_hosts), []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if foreign := message.keys() - {"role", "content", "name", "images", "refusal"}:
                raise APIError(400, f"messages with {min(foreign)!r} are not supported", "messages")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise APIError(400, "a message's content must be a text or a list of parts", "messages")
            turns.append({"role": role, "content": [self._part(part, pictures) for part in parts]})
            for part in message.get("images") or []:  # of an earlier answer that the client sends back
                turns[-1]["content"].append(self._part(part, pictures))
        return turns

    @staticmethod
    def _part(part: dict, pictures: Pictures) -> dict:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if kind == "image_url" and isinstance(url, str):
            return {"type": "image", "image": pictures.add_url(url)}
        raise APIError(400, f"a part must be a text or an image_url, got {str(kind)[:50]!r}", "messages")

    async def picture(self, groups: Sequence[torch.Tensor]) -> str:
        """Return the base64 PNG of a drawing, given by the codes (K,) of its positions so far. The others are grey."""
        (image,) = await self.decode([groups])
        return base64.b64encode(await asyncio.to_thread(picture_bytes, image)).decode()

    def num_candidates(self, body: ImageRequest, inputs: dict) -> int:
        """Return how many candidates to draw: as the request says, else the model's default; 1 for no ranking.

        Args:
            body: the request.
            inputs: the processor's output for the prompt. That of an edit has no text to rank by.

        Raises:
            APIError: there are fewer candidates than drawings, or the request for candidates is an edit.
            ValueError: the model cannot rank drawings, see `check_ranking`.
        """
        ids, count = inputs.get("ranking_input_ids"), body.candidates
        if count is None and ids is not None and not body.stream:
            count = image_generation(self.model.generation_config).get("candidates")
        if (count or 1) == 1:
            return 1
        if ids is None:
            raise APIError(
                400,
                "candidates: the drawings of an edit cannot be ranked, since its instruction does not describe them",
                "candidates",
            )
        if count < body.n:
            raise APIError(400, f"candidates: {count} are too few for n {body.n}", "candidates")
        check_ranking(self.model.visual, ids)
        return count

    def score(self, inputs: dict, choices: list[str]) -> Future:
        """Score given answers to one prompt, in a thread that scores for one request at a time.

        Args:
            inputs: the processor's output for the prompt.
            choices: C answers.

        Returns:
            A future of their `UniTokScores`, of shape (1, C).

        Raises:
            QueueFull: as many requests as may wait for the engine are waiting to be scored.
            ValueError: see `answer_ids`; also if the prompt and the longest answer do not fit into a row.
        """
        inputs, targets = inputs.to(self.model.device), answer_ids(self.processor, choices).to(self.model.device)[None]
        self.engine.check_length(inputs["input_ids"].shape[1] + targets.shape[2])
        self._scored = [future for future in self._scored if not future.done()]
        if len(self._scored) > self.engine.max_queue:  # one of them is running
            raise QueueFull(f"{len(self._scored) - 1} requests are waiting to be scored.")

        def scored() -> UniTokScores:
            parts = [self.model.score(**inputs, target_ids=part) for part in targets.split(CHOICES_AT_ONCE, dim=1)]
            names = ("log_likelihoods", "num_targets")
            return UniTokScores(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))

        self._scored.append(self._scorer.submit(scored))
        return self._scored[-1]

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        """Embed texts and images (data URLs).

        Returns:
            The vectors, (N, D), float32, and the number of text tokens.

        Raises:
            APIError: the model has no text tower for the tokenizer, or a picture is unusable.
        """
        pictures, visual = Pictures(self.url_hosts), self.model.visual
        is_image = torch.tensor([text.startswith("data:") for text in texts])
        rows, num_tokens = torch.empty(len(texts), visual.config.vision_config.projection_dim), 0
        if is_image.any():
            images = [pictures.add_url(text) for text in texts if text.startswith("data:")]
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            rows[is_image] = visual.get_image_features(pixels.to(visual.device)).pooler_output.float().cpu()
        if not is_image.all():
            if not has_text_tower(self.model, self.processor):
                raise APIError(
                    400, "input: this model has no text tower for its tokenizer, so it embeds images only", "input"
                )
            texts = [text for text in texts if not text.startswith("data:")]
            inputs = text_tower_inputs(self.model, self.processor, texts)
            rows[~is_image] = visual.get_text_features(**inputs).pooler_output.float().cpu()
            num_tokens = int(inputs["attention_mask"].sum())
        return rows, num_tokens


@contextmanager
def refusals():
    """Context manager that turns errors of the engine and the model into errors of the API."""
    try:
        yield
    except QueueFull as error:
        raise APIError(429, str(error)) from error
    except (ValueError, TypeError) as error:
        raise APIError(400, str(error)) from error


async def of_engine(call, *args, **options):
    """Call a function of the engine or the model in a thread, and turn its errors into errors of the API."""
    with refusals():
        return await asyncio.to_thread(call, *args, **options)


async def results(request: Request, futures: list[Future]) -> list:
    """Wait for the results of all futures. Cancel them if the client disconnects.

    Raises:
        APIError: the engine or the model refused a request, or the client has disconnected.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancel(futures)

    watcher = asyncio.create_task(watch())
    try:
        with refusals():
            return await asyncio.gather(*map(asyncio.wrap_future, futures))
    except asyncio.CancelledError as error:
        if not watcher.done():  # the request timed out
            raise
        raise APIError(499, "the client has gone") from error
    finally:
        watcher.cancel()
        cancel(futures)


class Events(StreamingResponse):
    """A response of server-sent events.

    Args:
        events: events, each an object to send as JSON.
        futures: the futures behind the events; they are cancelled if the client disconnects.
    """

    def __init__(self, events: AsyncIterator[dict], futures: list[Future]):
        super().__init__(self._lines(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.futures = futures

    @staticmethod
    async def _lines(events: AsyncIterator[dict]) -> AsyncIterator[str]:
        async for event in events:
            kind = f"event: {event['type']}\n" if "type" in event else ""
            yield f"{kind}data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self.futures)


class TextPieces:
    """Incremental detokenizer: whole characters only, and nothing from the first stop string on.

    Args:
        tokenizer: the tokenizer.
        stops: stop strings.
        is_chat: whether to strip the space that tokenizers put before the first word.
    """

    def __init__(self, tokenizer, stops: list[str], is_chat: bool):
        self.tokenizer, self.stops, self.is_chat = tokenizer, stops, is_chat
        self.ids: list[int] = []
        self.sent, self.is_over = "", False

    def add(self, token: int | None) -> str:
        """Return the text that a token adds. At the end, call it with None for the text that was held back."""
        if token is not None:
            self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        text = text.lstrip() if self.is_chat else text
        if places := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
            text, self.is_over = text[: min(places)], True
        elif token is not None:
            held = max((len(stop) for stop in self.stops), default=1) - 1
            if text.endswith("\ufffd"):
                return ""
            text = text[: len(text) - held] if held else text
        new, self.sent = text[len(self.sent) :], max(text, self.sent, key=len)
        return new


class Answers:
    """Responses to chats and completions, whole or as a stream.

    Args:
        service: the service.
        body: the request.
        kind: the response's `object`, "chat.completion" or "text_completion".
        prefix: prefix of the response's id.
    """

    def __init__(self, service: Service, body: TextOptions, kind: str, prefix: str):
        self.service, self.body, self.kind = service, body, kind
        self.is_chat = kind == "chat.completion"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}

    async def respond(self, request: Request, prompts: list[dict], with_images: bool) -> Response:
        """Submit the prompts to the engine and respond with the answers.

        Args:
            request: the HTTP request.
            prompts: inputs of the engine, one per answer.
            with_images: whether the answers may contain images.

        Raises:
            APIError: the engine or the model refused a prompt, or an option does not apply.
        """
        body, engine, stream = self.body, self.service.engine, Stream()
        options, call = body.generation(), engine.answer
        if with_images:
            call = engine.interleaved
            options["image_options"] = {} if body.guidance is None else {"guidance_scale": body.guidance}
        elif getattr(body, "guidance", None) is not None:
            raise APIError(
                400, 'guidance: applies to images only; request them with modalities=["text", "image"]', "guidance"
            )
        if body.stops:
            options |= {"stop_strings": body.stops, "tokenizer": self.service.processor.tokenizer}
        seed = body.seed
        if seed is None and options["do_sample"]:
            seed = int(torch.randint(2**31, ()))

        def asked(index: int, inputs: dict) -> Future:
            tell = partial(stream.tell, index) if body.stream else None
            room = engine.max_length - inputs["input_ids"].shape[1]  # exact for text only: images take more
            return call(
                inputs,
                self.service.metrics.first("first_token", tell),
                seed=None if seed is None else seed + index,
                max_new_tokens=body.max_tokens or max(1, min(MAX_TOKENS, room)),
                **options,
            )

        with refusals():
            futures = await submit(partial(asked, index, inputs) for index, inputs in enumerate(prompts))
        num_prompt = sum(inputs["input_ids"].shape[1] for inputs in prompts)
        if body.stream:
            return Events(self._events(stream, futures, num_prompt), futures)
        start = time.monotonic()
        choices, num_tokens = [], 0
        for index, result in enumerate(await results(request, futures)):
            ids, images = result if with_images else (result, [])
            num_tokens += len(ids)
            message, reason = await self._message(ids, images)
            choices.append({"index": index, "finish_reason": reason, "logprobs": None} | message)
        self.service.metrics.observe("answer", time.monotonic() - start)
        answer = {"object": self.kind, **self.head, "choices": choices, "usage": usage(num_prompt, num_tokens)}
        return JSONResponse(answer)

    async def choose(self, request: Request, inputs: dict) -> Response:
        """Respond with the likeliest of the given answers and the log-likelihoods of all, in nats.

        Args:
            request: the HTTP request; its body is a `ChatRequest` with `choices`.
            inputs: the processor's output for the prompt.

        Raises:
            APIError: see `Service.score`.
        """
        body: ChatRequest = self.body
        start = time.monotonic()
        future = await of_engine(self.service.score, inputs, body.choices)
        (scores,) = await results(request, [future])
        self.service.metrics.observe("answer", time.monotonic() - start)
        values = scores.means if body.by_length else scores.log_likelihoods
        best, num_tokens = int(values.argmax()), scores.num_targets[0].tolist()
        rows = zip(body.choices, scores.log_likelihoods[0].tolist(), num_tokens)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": body.choices[best]},
            "choice_scores": [{"content": c, "log_likelihood": value, "num_tokens": n} for c, value, n in rows],
        }
        used = usage(inputs["input_ids"].shape[1], num_tokens[best])
        return JSONResponse({"object": self.kind, **self.head, "choices": [choice], "usage": used})

    async def _message(self, ids: torch.Tensor, images) -> tuple[dict, str]:
        pieces = TextPieces(self.service.processor.tokenizer, self.body.stops, self.is_chat)
        pieces.ids = [token for token in ids.tolist() if token != self.service.model.config.image_token_id]
        text = pieces.add(None)
        reason = self._reason(ids, pieces)
        if not self.is_chat:
            return {"text": text}, reason
        message = {"role": "assistant", "content": text}
        if len(images):
            pngs = await asyncio.gather(*(self.service.picture(codes.unbind(dim=1)) for codes in images))
            message["images"] = [*map(image_part, pngs)]
        return {"message": message}, reason

    def _reason(self, ids: torch.Tensor, pieces: TextPieces) -> str:
        ends = self.service.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return "stop" if pieces.is_over or len(ids) and int(ids[-1]) in ends else "length"

    async def _events(self, stream: Stream, futures: list[Future], num_prompt: int) -> AsyncIterator[dict]:
        """Yield the chunks of all answers in the order in which they are generated."""
        model = self.service.model
        pieces = [TextPieces(self.service.processor.tokenizer, self.body.stops, self.is_chat) for _ in futures]
        groups: list[list[torch.Tensor]] = [[] for _ in futures]
        num_tokens = 0

        def chunk(index: int, delta: dict, reason: str | None = None) -> dict:
            choice = {"index": index, "finish_reason": reason, "logprobs": None}
            choice |= {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
            kind = "chat.completion.chunk" if self.is_chat else self.kind
            return {"object": kind, **self.head, "choices": [choice]}

        if self.is_chat:
            for index in range(len(futures)):
                yield chunk(index, {"role": "assistant", "content": ""})
        async for index, value in stream.items(futures):
            if value is None:
                if is_broken_off(futures[index]):
                    yield {"error": {"message": "the answer was broken off", "type": "server_error"}}
                    return
                result = futures[index].result()
                ids = result[0] if isinstance(result, tuple) else result
                if text := pieces[index].add(None):
                    yield chunk(index, {"content": text})
                yield chunk(index, {}, self._reason(ids, pieces[index]))
                continue
            if value.ndim:
                groups[index].append(value)
                if len(groups[index]) == model.config.num_image_positions:
                    png = await self.service.picture(groups[index])
                    yield chunk(index, {"images": [image_part(png)]})
                    groups[index] = []
                continue
            num_tokens += 1
            if not pieces[index].is_over and (text := pieces[index].add(int(value))):
                yield chunk(index, {"content": text})
        if (self.body.stream_options or {}).get("include_usage"):
            kind = "chat.completion.chunk" if self.is_chat else self.kind
            yield {"object": kind, **self.head, "choices": [], "usage": usage(num_prompt, num_tokens)}


def is_broken_off(future: Future) -> bool:
    """Return whether a finished request was cancelled or failed."""
    return future.cancelled() or future.exception() is not None


def tell_partial(stream: Stream, index: int, shown: list[int]) -> Callable[[torch.Tensor], None]:
    """Build the function by which the engine tells of a drawing's positions, each with its codes (K,).

    It wakes the event loop only for partial images: more often would slow down the engine's thread.

    Args:
        stream: stream of the requests.
        index: index of the drawing.
        shown: numbers of positions after which a partial image is shown.
    """
    groups: list[torch.Tensor] = []

    def tell(codes: torch.Tensor) -> None:
        groups.append(codes)
        if len(groups) in shown:
            stream.tell(index, groups.copy())

    return tell


async def image_events(
    service: Service, stream: Stream, futures: list[Future], shown: list[int], prefix: str
) -> AsyncIterator[dict]:
    """Yield events of partial and finished drawings as they are drawn.

    Args:
        service: the service.
        stream: stream of the requests, see `tell_partial`.
        futures: futures of the requests, one per drawing. Each event has the `index` of its drawing.
        shown: numbers of positions after which a partial image is shown.
        prefix: prefix of the events' types.
    """
    start, has_begun = time.monotonic(), False

    def event(kind: str, index: int, png: str) -> dict:
        head = {"type": f"{prefix}.{kind}", "index": index, "created_at": int(time.time())}
        return head | {"b64_json": png, "output_format": "png", "size": service.size}

    async for index, groups in stream.items(futures):
        if groups is None:
            if is_broken_off(futures[index]):
                yield {"type": "error", "error": {"message": "the drawing was broken off", "type": "server_error"}}
                return
            yield event("completed", index, await service.picture(futures[index].result().unbind(dim=1)))
            continue
        png = await service.picture(groups)
        if not has_begun:
            service.metrics.observe("first_partial_image", time.monotonic() - start)
            has_begun = True
        yield event("partial_image", index, png) | {"partial_image_index": shown.index(len(groups))}


def image_part(png: str) -> dict:
    """Build the message part of an image from its base64 PNG."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}


def usage(num_prompt: int, num_tokens: int) -> dict:
    """Build the `usage` object of a response from the numbers of prompt and generated tokens."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": num_prompt + num_tokens}
