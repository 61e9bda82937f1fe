"""The engine: drawings, edits and answers of many callers in one running batch.

    submit -> queue -> prompt, in chunks -> position after position, together with all others -> result

A request takes a row of the batch for its prompt, and one for each null prompt of guidance. It joins at any time and
leaves when it is done or cancelled. A step of the engine is one pass of the LLM over all rows, so that the weights are
read once for all of them. Then drawings choose the K codes of their next position, and answers their next token.

Keys and values are in preallocated slots of one length, one slot a row. The number of slots limits the admitted
requests, which come in the order of submission. A slot keeps the keys of a prompt after its request has left. A prompt
with the same beginning (another question about the same picture) continues from a copy of them.

Slots hold the keys and values of plain attention. The rows of another LLM (with a recurrent state, a sliding window,
linear biases) have caches of their own, and each step computes them one after another.

Each request gets the result that it gets alone with its seed. It has its own random numbers, and its positions start
at 0. Its attention and its logits processors do not see other rows.
"""

import copy
import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .drawing_unitok import UniTokCodeSampler, UniTokDrawingOptions, has_keys
from .fast_drawing_unitok import UniTokDrawingCaches, prepare_drawing
from .growing_cache_unitok import UniTokGrowingLayer, growing_cache
from .interleaved_unitok import UniTokAnswerEnd
from .modeling_unitok_mllm import UniTokMLLMForConditionalGeneration
from .packing_unitok import copy_changed, pack_linears


logger = logging.get_logger(__name__)


class QueueFull(RuntimeError):
    """The queue is full: `max_queue` requests are waiting."""


class UniTokSlotLayer(CacheLayerMixin):
    """Keys and values of one layer, in slots. A pass uses some of the slots, each with its own length.

    Args:
        num_slots: sequences.
        max_length: positions of each. The memory is allocated at the first pass.
        dtype: of the stored keys and values; None for their own.
    """

    is_compileable = True  # slots have a fixed length, of which a part is in use

    def __init__(self, num_slots: int, max_length: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.num_slots, self.max_length, self.dtype = num_slots, max_length, dtype

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (  # zeros, since masked values must be finite
            states.new_zeros((self.num_slots, states.shape[1], self.max_length, states.shape[3]), dtype=self.dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def place(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Set the place of the next pass's keys and values: slots (N,) and positions (N, T)."""
        self.slots, self.positions = slots, positions
        self.end = int(positions.max()) + 1
        first, last = int(slots[0]), int(slots[-1])
        is_range = last - first + 1 == len(slots) and bool((slots.diff() == 1).all())
        self.rows = slice(first, last + 1) if is_range else slots  # a view of the memory, or a copy of rows of it

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the keys and values of a pass, (N, heads, T, dims).

        Returns:
            All keys and values of these slots up to the end of the longest, (N, heads, end, dims).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for memory, states in ((self.keys, key_states), (self.values, value_states)):
            memory[self.slots[:, None], :, self.positions] = states.transpose(1, 2).to(memory.dtype)
        return self.keys[self.rows, :, : self.end], self.values[self.rows, :, : self.end]

    def copy(self, source: int, target: int, length: int) -> None:
        for memory in (self.keys, self.values):
            memory[target, :, :length] = memory[source, :, :length]

    def get_seq_length(self) -> torch.Tensor:
        """Return the lengths as (N, 1, 1, 1), so that a comparison with the positions of keys gives a mask."""
        return self.positions[:, -1, None, None, None] + 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0

    def get_max_length(self) -> int:
        return self.max_length


def _without_layers(decoder: nn.Module) -> nn.Module:
    """Copy a decoder to one that returns its inputs: its causal LM then computes the logits of known states."""

    def forward(*args, inputs_embeds: torch.Tensor, **kwargs) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    decoder = copy.copy(decoder)  # with its attributes, which some causal LMs read
    decoder._modules, decoder.forward = {}, forward
    return decoder


@dataclass(eq=False, repr=False)
class _Row:
    """A sequence in a slot.

    Attributes:
        prompt: its embeddings, (T, D).
        slot: the slot of its keys and values.
        length: number of its positions that the LLM has processed.
        state: the LLM's last state, (D,), once nothing is pending.
        pending: inputs that the LLM has not processed yet, (T', D).
        caches: its own, if rows are not batched.
    """

    prompt: torch.Tensor
    slot: int = -1
    length: int = 0
    state: torch.Tensor | None = None
    pending: torch.Tensor = None
    caches: UniTokDrawingCaches | None = None

    def __post_init__(self):
        self.pending = self.prompt

    def push(self, embeds: torch.Tensor) -> None:
        self.pending, self.state = embeds, None


@dataclass(eq=False, repr=False)
class _Request:
    """A request: common to drawings and answers.

    Attributes:
        rows: its rows, the prompt's first.
        length: final length of the longest row.
        tell: called with each new group of codes (K,) or token (), in the engine's thread.
    """

    rows: list[_Row]
    length: int
    tell: Callable[[torch.Tensor], None] | None
    future: Future = field(default_factory=Future)

    @property
    def is_ready(self) -> bool:
        return all(row.state is not None for row in self.rows)


@dataclass(eq=False, repr=False)
class _Drawing(_Request):
    """A request of one image.

    Attributes:
        options: of the drawing.
        weights: guidance scale minus 1, of each row but the first.
        noise: (positions, K), uniform in [0, 1).
        groups: the codes of each position so far, (K,).
    """

    options: UniTokDrawingOptions = None
    weights: list[float] = None
    noise: torch.Tensor = None
    groups: list[torch.Tensor] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class _Answer(_Request):
    ids: torch.Tensor = None  # (1, T), prompt and answer
    prompt_length: int = 0
    processors: LogitsProcessorList = None
    criteria: StoppingCriteriaList = None
    random: torch.Generator | None = None  # None for the likeliest token


class UniTokEngine:
    """Run the requests for one model in one batch. Its methods may be called from any thread.

    Args:
        model: in eval mode; its weights must not change while the engine uses it.
        max_rows: rows of the batch, and slots.
        max_length: positions of a slot, for prompt and answer or image; None for the LLM's number, at most 2048.
        max_queue: requests that may wait for rows.
        prefill_tokens: prompt positions in one step, at most (but one for each row), so that a long prompt does not
            delay running requests. If rows are not batched, a prompt is processed whole.

    Attributes:
        is_batched: whether the LLM computes all rows in one pass. False if that gives other logits than the model.

    Raises:
        ValueError: a size is not positive, or the LLM gives other logits even row by row.

    Example:
        >>> engine = UniTokEngine(model)
        >>> threading.Thread(target=engine.run).start()
        >>> future = engine.draw(processor(text="a red circle", generation_mode="image"), seed=0)
        >>> codes = future.result()  # (K, L)
        >>> engine.stop()
    """

    def __init__(
        self,
        model: UniTokMLLMForConditionalGeneration,
        max_rows: int = 32,
        max_length: int | None = None,
        max_queue: int = 256,
        prefill_tokens: int = 512,
    ):
        for name, value in (("max_rows", max_rows), ("max_length", max_length), ("prefill_tokens", prefill_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        most = model.config.llm_sizes.max_positions or 2048
        self.model, self.max_rows, self.max_queue, self.prefill_tokens = model, max_rows, max_queue, prefill_tokens
        self.max_length = min(max_length or 2048, most)
        self._parts = prepare_drawing(model)
        self._llm, cache = growing_cache(self._parts.llm, self.max_length)
        self.is_batched = all(type(layer) is UniTokGrowingLayer for layer in cache.layers)
        layers = cache.layers if self.is_batched else []
        self._cache = Cache(layers=[UniTokSlotLayer(max_rows, self.max_length, layer.dtype) for layer in layers])
        self._embedder_cache = Cache(layers=[UniTokSlotLayer(max_rows, model.config.num_image_positions)])
        decoder = model.get_decoder()
        self._output_layer = pack_linears(
            copy_changed(model.language_model, lambda module: _without_layers(module) if module is decoder else module)
        )
        self._free = deque(range(max_rows))  # the slot that has been free longest comes first
        self._held = [model.get_input_embeddings().weight[:0].detach()] * max_rows  # the prompts in the slots, (T, D)
        self._queue: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._seeds = itertools.count(torch.seed() % 2**31)
        self.num_steps = self.num_rows_computed = self.num_positions_reused = 0
        self.is_batched = self.is_batched and self._can_batch()
        if not self.is_batched:
            self.prefill_tokens = self.max_length  # after it, a recurrent state takes single positions
            if not self._is_exact():
                raise ValueError(f"{model.config.text_config.model_type} gives other logits position by position.")

    # --- what callers call ---

    def draw(self, inputs: dict, tell: Callable | None = None, sample: int = 0, **options) -> Future:
        """Submit a drawing of one image.

        Args:
            inputs: of `processor(text=..., generation_mode="image" or "edit")`, one prompt.
            tell: called in the engine's thread with the codes of each position, (K,).
            sample: index of the sample for this seed: sample j is row j of
                `generate_image_codes(num_return_sequences=...)`.
            options: of `generate_image_codes`, but for `candidates`: submit samples, and rank their codes.

        Returns:
            The future of the codes, (K, L).

        Raises:
            ValueError: see `generate_image_codes`; `candidates` above 1; the request needs more rows or positions than the engine has.
            QueueFull: too many requests are waiting.
        """
        return self._submit(self._drawing(inputs, tell, sample, **options))

    def answer(self, inputs: dict, tell: Callable | None = None, seed: int | None = None, **options) -> Future:
        """Submit an answer to one prompt.

        Args:
            inputs: of `processor(...)` or its chat template, one prompt.
            tell: called in the engine's thread with each token, ().
            seed: for `do_sample`: the answer equals that of `generate` after `torch.manual_seed(seed)`.
            options: of transformers' `generate`, except those for several sequences.

        Returns:
            The future of the answer's ids, (T,), with the token that ends it.

        Raises:
            ValueError: see `generate`; options that need several sequences; too many positions.
            QueueFull: too many requests are waiting.
        """
        random = torch.Generator(self.model.device).manual_seed(next(self._seeds) if seed is None else seed)
        return self._submit(self._answer(inputs, tell, random, **options))

    def interleaved(
        self,
        inputs: dict,
        tell: Callable | None = None,
        seed: int | None = None,
        max_images: int = 4,
        image_options: dict | None = None,
        **options,
    ) -> Future:
        """Submit an answer of text and images to one prompt.

        Args:
            inputs: of `processor(..., generation_mode="interleaved")`, one prompt.
            tell: called in the engine's thread with each token, (), and the codes of each position, (K,).
            seed: of the text, as in `answer`, and of the images: image n (from 0) is drawn with the seed plus n.
            max_images: see `generate_interleaved`.
            image_options: see `generate_interleaved`.
            options: see `generate_interleaved`.

        Returns:
            The future of the new ids (T,) and of the codes (N, K, L), as of `generate_interleaved`.

        Raises:
            ValueError: see `generate_interleaved` and `answer`.
            QueueFull: too many requests are waiting.
        """
        seed = next(self._seeds) if seed is None else seed
        random = torch.Generator(self.model.device).manual_seed(seed)
        pieces = self._pieces(dict(inputs), tell, random, seed, max_images, dict(image_options or {}), options)
        whole, current = Future(), self._submit(next(pieces))

        def go_on(done: Future) -> None:
            """Submit the next piece when one is done, before all waiting requests."""
            nonlocal current
            if done.cancelled() or whole.cancelled():
                whole.cancel()
                return
            try:
                request = pieces.send(done.result())
                self._check_size(request)
            except StopIteration as stop:
                if whole.set_running_or_notify_cancel():
                    whole.set_result(stop.value)
                return
            except Exception as error:  # of a step, or of the next piece
                if whole.set_running_or_notify_cancel():
                    whole.set_exception(error)
                return
            current = request.future
            current.add_done_callback(go_on)
            with self._changed:
                self._queue.appendleft(request)

        current.add_done_callback(go_on)
        whole.add_done_callback(lambda whole: whole.cancelled() and current.cancel())
        return whole

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def run(self) -> None:
        """Serve until `stop`, then finish the running requests. Needs its own thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._running or self._is_stopping)
                if self._is_stopping and not self._queue and not self._running:
                    return
            try:
                self.step()
            except Exception as error:  # ends the running requests, but not the engine
                logger.exception("A step failed.")
                for request in [*self._running]:
                    self._leave(request)
                    if request.future.set_running_or_notify_cancel():
                        request.future.set_exception(error)

    def stop(self, drop: bool = False) -> None:
        """Refuse new requests, and let `run` end after those submitted.

        Args:
            drop: cancel these.
        """
        with self._changed:
            self._is_stopping = True
            submitted = [*self._queue, *self._running] if drop else []
            self._changed.notify_all()
        for request in submitted:
            request.future.cancel()

    # --- a step ---

    @torch.inference_mode()
    def step(self) -> None:
        """Admit requests for which there are rows, then advance each by a chunk of its prompt or by a position."""
        self._drop_cancelled()
        self._admit()
        rows = [row for request in self._running for row in request.rows if row.state is None]
        positions = [row for row in rows if len(row.pending) == 1]
        prompts = [row for row in rows if len(row.pending) > 1]
        for chunk in (positions, self._chunk(prompts)):
            if chunk:
                self._advance(chunk)
        ready = [request for request in self._running if request.is_ready]
        for kind, bring_on in ((_Drawing, self._bring_on_drawings), (_Answer, self._bring_on_answers)):
            if requests := [request for request in ready if isinstance(request, kind)]:
                bring_on(requests)
        self.num_steps += 1

    def _drawing(self, inputs: dict, tell: Callable | None, sample: int = 0, **options) -> _Drawing:
        if options.get("seed") is None:
            options["seed"] = next(self._seeds)
        if (options.get("candidates") or 1) > 1:
            raise ValueError("The engine draws one image: submit each candidate as a sample, and rank their codes.")
        inputs = {name: value for name, value in inputs.items() if not name.startswith("ranking_")}
        with torch.no_grad():
            chosen, guidance, noise = self.model.drawing_inputs(
                **inputs, **options | {"num_return_sequences": sample + 1, "candidates": 1}
            )
        masks = guidance.attention_mask[sample :: sample + 1].bool()
        embeds = guidance.inputs_embeds[sample :: sample + 1]
        rows = [_Row(embeds[mask]) for embeds, mask in zip(embeds, masks)]
        length = max(len(row.prompt) for row in rows) + len(noise[sample])
        weights = [scale - 1 for scale in guidance.scales]
        return _Drawing(rows, length, tell, options=chosen, weights=weights, noise=noise[sample])

    def _answer(self, inputs: dict, tell: Callable | None, random: torch.Generator, **options) -> _Answer:
        prepared = {}

        def keep(model, input_ids, logits_processor, stopping_criteria, generation_config, tokenizer=None, **kwargs):
            prepared.update(kwargs, input_ids=input_ids, processors=logits_processor, criteria=stopping_criteria)
            return generation_config

        # the library prepares everything as for its own loop, except that it drops the tokenizer
        stops, tokenizer = options.pop("stop_strings", None), options.pop("tokenizer", None)
        if stops:
            criteria = [*(options.pop("stopping_criteria", None) or []), StopStringCriteria(tokenizer, stops)]
            options["stopping_criteria"] = StoppingCriteriaList(criteria)
        config: GenerationConfig = self.model.generate(**inputs, **options, custom_generate=keep)
        if config.num_beams > 1 or config.num_return_sequences > 1 or len(prepared["input_ids"]) > 1:
            raise ValueError("The engine answers one prompt with one sequence: no beams, no several answers.")
        ids, images = prepared["input_ids"], (prepared.get("mm_encoder_outputs") or {}).get("image")
        codes = None if images is None else images.image_codes
        with torch.no_grad():
            (embeds,), _ = self.model.embed(ids, image_codes=codes)
        return _Answer(
            [_Row(embeds)],
            config.max_length,
            tell,
            ids=ids,
            prompt_length=ids.shape[1],
            processors=prepared["processors"],
            criteria=prepared["criteria"],
            random=random if config.do_sample else None,
        )

    def _pieces(self, inputs, tell, random, seed, max_images, image_options, options):
        """Yield the requests of an interleaved answer, texts and images in turn; the result of each is sent back."""
        model = self.model
        boi, eoi, placeholder = model.config.boi_token_id, model.config.eoi_token_id, model.config.image_token_id
        unconditional = {name: inputs.pop(name) for name in [*inputs] if name.startswith("unconditional_")}
        ids = prompt = inputs["input_ids"]
        known = model.encode_images(inputs["pixel_values"]) if "pixel_values" in inputs else inputs.get("image_codes")
        known = (
            ids.new_zeros(0, model.depth_head.num_codebooks, model.config.num_image_positions)
            if known is None
            else known
        )
        drawn, room = known[:0], options.pop("max_new_tokens", None) or 256
        suppressed = [*(model.generation_config.suppress_tokens or []), *(options.pop("suppress_tokens", None) or [])]
        while room > 0:
            codes = torch.cat([known, drawn])
            images = {"image_codes": codes} if len(codes) else {}
            text = yield self._answer(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images},
                tell,
                random,
                max_new_tokens=room,
                suppress_tokens=suppressed if len(drawn) < max_images else [*suppressed, boi],
                stopping_criteria=StoppingCriteriaList([UniTokAnswerEnd(boi, None, None)]),
                **options,
            )
            ids, room = torch.cat([ids, text[None]], dim=1), room - len(text)
            if text[-1] != boi:
                break
            new = yield self._drawing(
                {"input_ids": ids, **images, **unconditional}, tell, seed=seed + len(drawn), **image_options
            )
            drawn = torch.cat([drawn, new[None]])
            ids = torch.cat([ids, ids.new_tensor([[*[placeholder] * new.shape[-1], eoi]])], dim=1)
        return ids[0, prompt.shape[1] :], drawn

    def _check_size(self, request: _Request) -> None:
        """
        Raises:
            ValueError: a request needs more rows or positions than there are.
        """
        if len(request.rows) > self.max_rows:
            raise ValueError(f"This needs {len(request.rows)} rows of the batch, which has {self.max_rows}.")
        if request.length > self.max_length:
            raise ValueError(f"This needs {request.length} positions; served are up to {self.max_length}.")

    def _submit(self, request: _Request) -> Future:
        self._check_size(request)
        with self._changed:
            if self._is_stopping:
                raise QueueFull("The server is stopping.")
            if len(self._queue) >= self.max_queue:
                raise QueueFull(f"{len(self._queue)} requests are waiting.")
            self._queue.append(request)
            self._changed.notify_all()
        return request.future

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._queue = deque(request for request in self._queue if not request.future.cancelled())
        for request in [request for request in self._running if request.future.cancelled()]:
            self._leave(request)

    def _admit(self) -> None:
        while self._queue and len(self._queue[0].rows) <= len(self._free):
            with self._changed:
                request = self._queue.popleft()
            for row in request.rows:
                self._take_slot(row)
            self._running.append(request)

    def _take_slot(self, row: _Row) -> None:
        """Take a slot for a row, which continues from the longest common beginning of a prompt, in place or copied."""
        shared = [_common_length(held, row.prompt) for held in self._held]
        source = max(range(self.max_rows), key=lambda slot: (shared[slot], slot in self._free))
        length = min(shared[source], len(row.prompt) - 1)  # the last position must be computed, for its state
        row.slot = source if source in self._free and length else self._free[0]
        self._free.remove(row.slot)
        if length and row.slot != source:
            for layer in self._cache.layers:
                layer.copy(source, row.slot, length)
        self.num_positions_reused += length
        row.length, row.pending = length, row.prompt[length:]
        self._held[row.slot] = row.prompt[:length]

    def _leave(self, request: _Request) -> None:
        self._running.remove(request)
        self._free.extend(row.slot for row in request.rows)

    def _chunk(self, prompts: list[_Row]) -> list[_Row]:
        """Select as many of the first rows as fit into `prefill_tokens`."""
        longest, count = 0, 0
        for count, row in enumerate(prompts):
            longest = max(longest, min(len(row.pending), self.prefill_tokens))
            if count and longest * (count + 1) > self.prefill_tokens:
                return prompts[:count]
        return prompts

    def _advance(self, rows: list[_Row]) -> None:
        """Run the LLM on the next pending positions of each row, at most `prefill_tokens`."""
        counts = [min(len(row.pending), self.prefill_tokens) for row in rows]
        if self.is_batched:
            embeds = nn.utils.rnn.pad_sequence([r.pending[:n] for r, n in zip(rows, counts)], batch_first=True)
            states = self._states(embeds, [row.slot for row in rows], [row.length for row in rows], counts)
        else:
            states = [self._state(row) for row in rows]
        self.num_rows_computed += len(rows)
        for row, count, state in zip(rows, counts, states):
            row.length += count
            if self.is_batched:
                self._held[row.slot] = row.prompt[: row.length]
            row.pending = row.pending[count:]
            row.state = None if len(row.pending) else state

    def _states(self, embeds: torch.Tensor, slots: list[int], starts: list[int], counts: list[int]) -> torch.Tensor:
        """Run embeddings (N, T, D). Returns the states (N, D) at the last of the `counts` positions of each slot."""
        device = embeds.device
        starts, counts = torch.tensor(starts, device=device), torch.tensor(counts, device=device)
        positions = starts[:, None] + torch.arange(embeds.shape[1], device=device)
        positions = positions.clamp_max(self.max_length - 1)  # padding, which the row's next positions overwrite
        slots = torch.tensor(slots, device=device)
        for layer in self._cache.layers:
            layer.place(slots, positions)
        keys = torch.arange(layer.end, device=device)
        mask = keys[None, None, None] <= positions[:, None, :, None]  # (N, 1, T, end)
        if self._llm.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)
        hidden_states = self._llm(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, cache=self._cache, use_cache=True
        ).last_hidden_state
        return hidden_states[torch.arange(len(counts), device=device), counts - 1]

    def _state(self, row: _Row) -> torch.Tensor:
        """Run the pending positions of a row with caches of its own. Returns the last state (D,)."""
        if not row.length:
            row.caches = self._parts.begin(self.max_length, 1, use_cache=True, cuda_graph=False)
        cache, device, end = row.caches.llm_cache, row.pending.device, row.length + len(row.pending)
        hidden_states = row.caches.llm(
            inputs_embeds=row.pending[None],
            attention_mask=torch.ones(1, end, dtype=torch.long, device=device) if has_keys(cache) else None,
            position_ids=torch.arange(row.length, end, device=device)[None],
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_states[0, -1]

    def _bring_on_drawings(self, drawings: list[_Drawing]) -> None:
        """Draw the K codes of the next position of each drawing."""
        rows = [row for drawing in drawings for row in drawing.rows]
        states = torch.stack([row.state for row in rows])
        device = states.device
        owners = torch.tensor([i for i, drawing in enumerate(drawings) for _ in drawing.rows], device=device)
        firsts = torch.tensor([0, *itertools.accumulate(len(d.rows) for d in drawings)][:-1], device=device)
        width = max(len(drawing.weights) for drawing in drawings)
        weights = torch.tensor([d.weights + [0.0] * (width - len(d.weights)) for d in drawings], device=device)
        others = [torch.where(weights[:, i] > 0, firsts + i + 1, firsts) for i in range(width)]
        noise = torch.stack([d.noise[len(d.groups)] for d in drawings]).to(device)
        samplers: dict[tuple, tuple[UniTokCodeSampler, list[int]]] = {}
        for i, drawing in enumerate(drawings):
            o = drawing.options
            key = (o.do_sample, float(o.temperature), o.top_k, float(o.top_p))
            samplers.setdefault(key, (UniTokCodeSampler(o.warpers()), []))[1].append(i)

        def choose(logits: torch.Tensor, k: int) -> torch.Tensor:
            logits = logits.float()
            guided = logits[firsts]
            guided = guided + sum(weights[:, i, None] * (guided - logits[other]) for i, other in enumerate(others))
            codes = torch.empty(len(drawings), dtype=torch.long, device=device)
            for sampler, places in samplers.values():
                codes[places] = sampler(guided[places], noise[places, k])
            return codes[owners]

        codes = self._parts.depth_head.generate(states, choose)[firsts]
        finished = []
        for drawing, group in zip(drawings, codes):
            drawing.groups.append(group)
            if drawing.tell is not None:
                drawing.tell(group)
            if len(drawing.groups) == len(drawing.noise):
                finished.append(drawing)
        for drawing in finished:
            self._finish(drawing, torch.stack(drawing.groups, dim=1))
        if going_on := [drawing for drawing in drawings if drawing not in finished]:
            slots = torch.tensor([drawing.rows[0].slot for drawing in going_on], device=device)
            (layer,) = self._embedder_cache.layers
            order = slots.argsort()
            layer.place(slots[order], torch.tensor([len(d.groups) - 1 for d in going_on], device=device)[order, None])
            groups = torch.stack([drawing.groups[-1] for drawing in going_on])
            embeds = self._parts.embedder(groups[order, :, None], self._embedder_cache)[order.argsort()]
            for drawing, embed in zip(going_on, embeds):
                for row in drawing.rows:
                    row.push(embed)

    def _bring_on_answers(self, answers: list[_Answer]) -> None:
        """Choose the next token of each answer."""
        states = torch.stack([answer.rows[0].state for answer in answers])
        logits = self._output_layer(inputs_embeds=states[:, None]).logits[:, -1].float()
        for answer, scores in zip(answers, logits):
            scores = answer.processors(answer.ids, scores[None])
            if answer.random is None:
                token = scores.argmax(dim=-1)
            else:
                token = torch.multinomial(scores.softmax(dim=-1), 1, generator=answer.random)[0]
            answer.ids = torch.cat([answer.ids, token[None]], dim=1)
            if answer.tell is not None:
                answer.tell(token[0])
            if answer.criteria(answer.ids, None).all():
                self._finish(answer, answer.ids[0, answer.prompt_length :])
            else:
                answer.rows[0].push(self.model.get_input_embeddings()(token))

    def _finish(self, request: _Request, result: torch.Tensor) -> None:
        self._leave(request)
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(result.clone())

    # --- whether it can ---

    def _can_batch(self) -> bool:
        try:
            return self._is_exact()
        except (RuntimeError, TypeError, ValueError):  # as when a model makes its biases from a mask of two dimensions
            return False

    @torch.inference_mode()
    def _is_exact(self) -> bool:
        """Whether passes over rows of unequal lengths give the logits of the model's own passes."""
        model = self.model
        ids = torch.arange(8, device=model.device) % model.get_input_embeddings().num_embeddings
        embeds = model.get_input_embeddings()(ids)
        rows = [_Row(embeds[:3], slot=0), _Row(embeds, slot=1)][: self.max_rows]
        self._advance(rows)
        rows[0].push(embeds[3:4])
        self._advance(rows[:1])
        is_exact = True
        for row in rows:
            expected = model.language_model(inputs_embeds=embeds[None, : row.length], use_cache=False).logits[0, -1]
            logits = self._output_layer(inputs_embeds=row.state[None, None]).logits[0, -1]
            far = (logits.float() - expected.float()).abs().max()
            tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
            is_exact = is_exact and bool(far <= tolerance * expected.float().abs().max())
        self._held = [embeds[:0]] * self.max_rows
        return is_exact


def _common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """Count the equal embeddings at the beginning of two prompts, (T, D) and (T', D)."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).all(dim=1).cumprod(dim=0).sum())


__all__ = ["QueueFull", "UniTokEngine"]
