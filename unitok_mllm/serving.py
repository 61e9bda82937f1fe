"""The engine: continuous batching of the drawings, edits and answers of many callers.

    submit -> queue -> prefill, in chunks -> decoding, one position a step, batched with all others -> result

A request takes one row of the batch for its prompt and one more for each null prompt of classifier-free guidance. It
joins the batch at any step and leaves when it is done or cancelled. A step is one pass of the LLM over all rows, so
that the weights are read once for all of them. Then each drawing samples the K codes of its next position, and each
answer its next token.

The KV cache is preallocated in slots of equal length, one per row. Requests are admitted in the order of submission
as slots become free. A slot keeps the keys and values of its prompt after the request has left: a later prompt with
the same prefix (another question about the same picture) continues from a copy of them.

Slots work for plain attention only. With any other LLM (recurrent state, sliding window, linear biases), each row has
its own cache, and a step computes the rows one after another.

On CUDA, the steps that advance each row by one position are recorded as CUDA graphs; see `engine_graphs`.

A request gets the same result as it would alone with the same seed. It has its own random numbers, its positions start
at 0, and its attention and logits processors do not see other rows.
"""

import copy
import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch
from torch import nn
from transformers import Cache, GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .cuda_graph_unitok import can_record
from .drawing_unitok import UniTokCodeSampler, has_keys, keep_plausible
from .engine_graphs import MIN_KEYS, RecordedSteps, power_of_two
from .engine_requests import Answer, Drawing, Request, Row
from .engine_slots import UniTokSlotLayer, range_of
from .fast_drawing_unitok import prepare_drawing
from .growing_cache_unitok import UniTokGrowingLayer, growing_cache
from .interleaved_unitok import UniTokAnswerEnd
from .modeling_unitok_mllm import UniTokMLLMForConditionalGeneration
from .packing_unitok import copy_changed, pack_linears


logger = logging.get_logger(__name__)


class QueueFull(RuntimeError):
    """The queue is full: `max_queue` requests are waiting."""


def _without_layers(decoder: nn.Module) -> nn.Module:
    """Copy a decoder without its layers. It returns its inputs, so its causal LM turns given states into logits."""

    def forward(*args, inputs_embeds: torch.Tensor, **kwargs) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    decoder = copy.copy(decoder)  # keeps its attributes, which some causal LMs read
    decoder._modules, decoder.forward = {}, forward
    return decoder


class UniTokEngine:
    """Run all requests to one model in one batch. Its methods may be called from any thread.

    Args:
        model: model in eval mode; its weights must not change while the engine uses it.
        max_rows: number of rows in the batch, and of slots.
        max_length: positions per slot, for the prompt and the answer or image together; None for the LLM's maximum,
            but no more than 2048.
        max_queue: number of requests that may wait for rows.
        prefill_tokens: maximum number of prompt positions, padding included, in one step, so that a long prompt does
            not delay running requests. If rows are not batched, a prompt is processed in one piece.
        cuda_graph: False to launch all kernels of each step from Python (slow; gives the same results). This also
            happens if no graph is possible: see `cuda_graph_unitok`.

    Attributes:
        is_batched: whether the LLM computes all rows in one pass. False if that changes the logits.

    Raises:
        ValueError: a size is not positive, `max_length` exceeds the LLM's positions, or decoding position by position
            changes the logits even for single rows.

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
        cuda_graph: bool = True,
    ):
        for name, value in (("max_rows", max_rows), ("max_length", max_length), ("prefill_tokens", prefill_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        most = model.config.llm_sizes.max_positions
        if most and max_length is not None and max_length > most:
            raise ValueError(f"max_length must be at most the LLM's {most} positions, got {max_length}.")
        self.model, self.max_rows, self.max_queue, self.prefill_tokens = model, max_rows, max_queue, prefill_tokens
        self.max_length = max_length or min(2048, most or 2048)
        self._parts = prepare_drawing(model)
        self._llm, cache = growing_cache(self._parts.llm, self.max_length)
        self.is_batched = all(type(layer) is UniTokGrowingLayer for layer in cache.layers)
        layers = cache.layers if self.is_batched else []
        self._recorded = RecordedSteps(spare_slot=max_rows) if cuda_graph and layers and can_record(model) else None
        num_slots = max_rows if self._recorded is None else max_rows + 1
        self._cache = Cache(layers=[UniTokSlotLayer(num_slots, self.max_length, layer.dtype) for layer in layers])
        self._embedder_cache = Cache(layers=[UniTokSlotLayer(num_slots, model.config.num_image_positions)])
        decoder = model.get_decoder()
        self._output_layer = pack_linears(
            copy_changed(model.language_model, lambda module: _without_layers(module) if module is decoder else module)
        )
        self._free = deque(range(max_rows))  # least recently used first
        self._held = [model.get_input_embeddings().weight[:0].detach()] * max_rows  # prompts in the slots, (T, D)
        self._held_hashes = torch.zeros(max_rows, self.max_length, dtype=torch.long)
        self._queue: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._seeds = itertools.count(torch.seed() % 2**31)
        self.num_steps = self.num_rows_computed = self.num_positions_reused = 0
        self.is_batched = self.is_batched and self._can_batch()
        if not self.is_batched:
            self.prefill_tokens = self.max_length  # after a prefill, a recurrent state takes single positions only
            if not self._is_exact():
                raise ValueError(
                    f"{model.config.text_config.model_type} gives different logits when it decodes position by position."
                )

    # --- what callers call ---

    def draw(self, inputs: dict, tell: Callable | None = None, sample: int = 0, **options) -> Future:
        """Submit a request to draw one image.

        Args:
            inputs: output of `processor(text=..., generation_mode="image" or "edit")` for one prompt, on any device.
            tell: called in the engine's thread with the codes of each position, (K,).
            sample: index of the sample for this seed: sample j is row j of
                `generate_image_codes(num_return_sequences=...)`.
            options: options of `generate_image_codes` except `candidates`: submit several samples and rank their codes
                instead.

        Returns:
            A future of the codes, (K, L).

        Raises:
            ValueError: see `generate_image_codes`; also if `candidates` is above 1, or the request needs more rows or
                positions than the engine has.
            QueueFull: too many requests are waiting, or the engine is stopping.
        """
        return self._submit(self._drawing(self._on_device(inputs), tell, sample, **options))

    def answer(self, inputs: dict, tell: Callable | None = None, seed: int | None = None, **options) -> Future:
        """Submit a request for a text answer to one prompt.

        Args:
            inputs: output of `processor(...)` or its chat template for one prompt, on any device.
            tell: called in the engine's thread with each token, ().
            seed: seed for `do_sample`; the answer equals that of `generate` after `torch.manual_seed(seed)`.
            options: options of transformers' `generate`, except those that need several sequences.

        Returns:
            A future of the answer's token ids, (T,), including the token that ends it.

        Raises:
            ValueError: see `generate`; also if an option needs several sequences, or the request needs more positions
                than a slot has.
            QueueFull: too many requests are waiting, or the engine is stopping.
        """
        random = torch.Generator(self.model.device).manual_seed(next(self._seeds) if seed is None else seed)
        return self._submit(self._answer(self._on_device(inputs), tell, random, **options))

    def interleaved(
        self,
        inputs: dict,
        tell: Callable | None = None,
        seed: int | None = None,
        max_images: int = 4,
        image_options: dict | None = None,
        **options,
    ) -> Future:
        """Submit a request for an answer of text and images to one prompt.

        Args:
            inputs: output of `processor(..., generation_mode="interleaved")` for one prompt, on any device.
            tell: called in the engine's thread with each token, (), and the codes of each position, (K,).
            seed: seed of the text, as in `answer`, and of the images: image n (from 0) is drawn with `seed + n`.
            max_images: see `generate_interleaved`.
            image_options: see `generate_interleaved`.
            options: see `generate_interleaved`.

        Returns:
            A future of the new token ids, (T,), and the codes of the images, (N, K, L), as `generate_interleaved`
            returns them.

        Raises:
            ValueError: see `generate_interleaved` and `answer`.
            QueueFull: too many requests are waiting, or the engine is stopping.
        """
        seed = next(self._seeds) if seed is None else seed
        random = torch.Generator(self.model.device).manual_seed(seed)
        pieces = self._pieces(
            self._on_device(inputs), tell, random, seed, max_images, dict(image_options or {}), options
        )
        whole, current = Future(), self._submit(next(pieces))

        def go_on(done: Future) -> None:
            """Submit the next piece when one is done, ahead of all waiting requests."""
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
            except Exception as error:  # raised by a step or by the next piece
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

    def check_length(self, length: int) -> None:
        """Check that a prompt and its answer or image, `length` positions together, fit into a row.

        Raises:
            ValueError: they do not.
        """
        if length > self.max_length:
            raise ValueError(f"The request needs {length} positions, but a row has {self.max_length}.")

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def run(self) -> None:
        """Serve requests until `stop` is called and all submitted ones are done. Run it in a thread of its own."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._running or self._is_stopping)
                if self._is_stopping and not self._queue and not self._running:
                    return
            try:
                self.step()
            except Exception as error:  # fails the running requests; the engine continues
                logger.exception("A step failed.")
                for request in [*self._running]:
                    self._leave(request)
                    if request.future.set_running_or_notify_cancel():
                        request.future.set_exception(error)

    def stop(self, drop: bool = False) -> None:
        """Refuse new requests, and let `run` return once the submitted ones are done.

        Args:
            drop: whether to cancel the submitted requests instead of finishing them.
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
        """Admit the requests that fit, then advance each by a chunk of its prompt or by one position."""
        self._drop_cancelled()
        self._admit()
        rows = [row for request in self._running for row in request.rows if row.state is None]
        positions = [row for row in rows if len(row.pending) == 1]
        prompts = [row for row in rows if len(row.pending) > 1]
        for chunk in (positions, self._chunk(prompts)):
            if chunk:
                self._advance(chunk)
        ready = [request for request in self._running if request.is_ready]
        for kind, bring_on in ((Drawing, self._bring_on_drawings), (Answer, self._bring_on_answers)):
            if requests := [request for request in ready if isinstance(request, kind)]:
                bring_on(requests)
        self.num_steps += 1

    def _on_device(self, inputs: dict) -> dict:
        device = self.model.device
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}

    def _drawing(self, inputs: dict, tell: Callable | None, sample: int = 0, **options) -> Drawing:
        if options.get("seed") is None:
            options["seed"] = next(self._seeds)
        if (options.get("candidates") or 1) > 1:
            raise ValueError(
                "The engine draws one image per request: submit each candidate as a sample, and rank their codes."
            )
        inputs = {name: value for name, value in inputs.items() if not name.startswith("ranking_")}
        with torch.no_grad():
            chosen, guidance, noise = self.model.drawing_inputs(
                **inputs, **options | {"num_return_sequences": sample + 1, "candidates": 1}
            )
        masks = guidance.attention_mask[sample :: sample + 1].bool()
        embeds = guidance.inputs_embeds[sample :: sample + 1]
        rows = [Row(embeds[mask]) for embeds, mask in zip(embeds, masks)]
        length = max(len(row.prompt) for row in rows) + len(noise[sample])
        weights = [scale - 1 for scale in guidance.scales]
        return Drawing(rows, length, tell, options=chosen, weights=weights, noise=noise[sample])

    def _answer(self, inputs: dict, tell: Callable | None, random: torch.Generator, **options) -> Answer:
        prepared = {}

        def keep(model, input_ids, logits_processor, stopping_criteria, generation_config, tokenizer=None, **kwargs):
            prepared.update(kwargs, input_ids=input_ids, processors=logits_processor, criteria=stopping_criteria)
            return generation_config

        # transformers prepares everything as for its own loop, but drops the tokenizer that stop strings need
        stops, tokenizer = options.pop("stop_strings", None), options.pop("tokenizer", None)
        if stops:
            criteria = [*(options.pop("stopping_criteria", None) or []), StopStringCriteria(tokenizer, stops)]
            options["stopping_criteria"] = StoppingCriteriaList(criteria)
        config: GenerationConfig = self.model.generate(**inputs, **options, custom_generate=keep)
        if config.num_beams > 1 or config.num_return_sequences > 1 or len(prepared["input_ids"]) > 1:
            raise ValueError("The engine answers with one sequence: no beam search, and not several answers.")
        ids, images = prepared["input_ids"], (prepared.get("mm_encoder_outputs") or {}).get("image")
        codes = None if images is None else images.image_codes
        with torch.no_grad():
            (embeds,), _ = self.model.embed(ids, image_codes=codes)
        return Answer(
            [Row(embeds)],
            config.max_length,
            tell,
            ids=ids,
            prompt_length=ids.shape[1],
            processors=prepared["processors"],
            criteria=prepared["criteria"],
            random=random if config.do_sample else None,
        )

    def _pieces(self, inputs, tell, random, seed, max_images, image_options, options):
        """Yield the requests of an interleaved answer, text and image in turn. The caller sends back each result."""
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

    def _check_size(self, request: Request) -> None:
        """Check that a request fits into the engine.

        Raises:
            ValueError: the request needs more rows or positions than the engine has.
        """
        if len(request.rows) > self.max_rows:
            raise ValueError(f"The request needs {len(request.rows)} rows, but the batch has {self.max_rows}.")
        self.check_length(request.length)

    def _submit(self, request: Request) -> Future:
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

    def _take_slot(self, row: Row) -> None:
        """Assign a slot to a row, and reuse the longest prefix that it shares with a prompt in any slot."""
        count = len(row.prompt)
        is_same = self._held_hashes[:, :count] == row.hashes
        lengths = torch.tensor([len(held) for held in self._held])
        shared = is_same.cumprod(dim=1).sum(dim=1).minimum(lengths).tolist()
        free = {*self._free}
        source = max(range(self.max_rows), key=lambda slot: (shared[slot], slot in free))
        # equal hashes are no proof; and the last position must be computed to get its state
        length = min(_common_length(self._held[source], row.prompt), count - 1)
        row.slot = source if source in free and length else self._free[0]
        self._free.remove(row.slot)
        if length and row.slot != source:
            for layer in self._cache.layers:
                layer.copy(source, row.slot, length)
        self.num_positions_reused += length
        row.length, row.pending = length, row.prompt[length:]
        self._held[row.slot], self._held_hashes[row.slot, :count] = row.prompt[:length], row.hashes

    def _leave(self, request: Request) -> None:
        self._running.remove(request)
        self._free.extend(row.slot for row in request.rows)

    def _chunk(self, prompts: list[Row]) -> list[Row]:
        """Select the first rows that together, padded, fit into `prefill_tokens`; at least one."""
        longest, count = 0, 0
        for count, row in enumerate(prompts):
            longest = max(longest, min(len(row.pending), self.prefill_tokens))
            if count and longest * (count + 1) > self.prefill_tokens:
                return prompts[:count]
        return prompts

    def _advance(self, rows: list[Row]) -> None:
        """Run the LLM on the pending positions of each row, at most `prefill_tokens` per row."""
        rows = sorted(rows, key=lambda row: row.slot)
        counts = [min(len(row.pending), self.prefill_tokens) for row in rows]
        if self.is_batched:
            embeds = nn.utils.rnn.pad_sequence([r.pending[:n] for r, n in zip(rows, counts)], batch_first=True)
            states = self._states(embeds, [row.slot for row in rows], [row.length for row in rows], counts)
        else:
            states = [self._state(row) for row in rows]
        self.num_rows_computed += len(rows)
        for row, count, state in zip(rows, counts, states):
            row.length += count
            if self.is_batched and row.length <= len(row.prompt):
                self._held[row.slot] = row.prompt[: row.length]
            if count < len(row.pending):
                row.pending = row.pending[count:]
            else:
                row.state = state

    def _states(self, embeds: torch.Tensor, slots: list[int], starts: list[int], counts: list[int]) -> torch.Tensor:
        """Run the LLM on embeddings (N, T, D), padded on the right.

        Args:
            embeds: the embeddings.
            slots: slot of each row.
            starts: first position of each row.
            counts: number of positions of each row that are not padding.

        Returns:
            The hidden state at the last of these positions, (N, D).
        """
        device, longest = embeds.device, embeds.shape[1]
        end = min(max(starts) + longest, self.max_length)
        if self._recorded is not None and longest == 1:
            end = min(max(power_of_two(end), MIN_KEYS), self.max_length)
            embeds, (slots, starts) = self._recorded.fill(embeds), self._recorded.fill_slots(slots, starts, device)
            (step,) = self._recorded.get(("llm", len(slots), end), lambda: [partial(self._pass, end=end)])
            return step(embeds, slots, starts)[: len(counts), 0]
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(longest, device=device)
        positions = positions.clamp_max(self.max_length - 1)  # of padding, which later positions overwrite
        hidden_states = self._pass(embeds, torch.tensor(slots, device=device), positions, end, range_of(slots))
        return hidden_states[torch.arange(len(counts), device=device), torch.tensor(counts, device=device) - 1]

    def _pass(
        self,
        embeds: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        end: int,
        slot_range: slice | None = None,
    ) -> torch.Tensor:
        """Run the LLM on embeddings (N, T, D), and return its hidden states; see `UniTokSlotLayer.place`."""
        for layer in self._cache.layers:
            layer.place(slots, positions, end, slot_range)
        keys = torch.arange(end, device=embeds.device)
        mask = keys[None, None, None] <= positions[:, None, :, None]  # (N, 1, T, end)
        if self._llm.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)
        return self._llm(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, cache=self._cache, use_cache=True
        ).last_hidden_state

    def _state(self, row: Row) -> torch.Tensor:
        """Run the pending positions of a row with its own caches. Returns the last hidden state, (D,)."""
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

    def _bring_on_drawings(self, drawings: list[Drawing]) -> None:
        """Sample the K codes of the next position of each drawing."""
        rows = [row for drawing in drawings for row in drawing.rows]
        states, passes = torch.stack([row.state for row in rows]), None
        if self._recorded is not None:
            states = self._recorded.fill(states)
            passes = self._recorded.get(("depth", len(states)), lambda: self._parts.depth_head.passes(states))
        device = states.device
        owners = [i for i, drawing in enumerate(drawings) for _ in drawing.rows]
        owners = torch.tensor(owners + [0] * (len(states) - len(owners)), device=device)
        firsts = torch.tensor([0, *itertools.accumulate(len(d.rows) for d in drawings)][:-1], device=device)
        width = max(len(drawing.weights) for drawing in drawings)
        weights = torch.tensor([d.weights + [0.0] * (width - len(d.weights)) for d in drawings], device=device)
        least = torch.tensor([[drawing.options.log_plausibility] for drawing in drawings], device=device)
        others = [torch.where(weights[:, i] > 0, firsts + i + 1, firsts) for i in range(width)]
        noise = torch.stack([d.noise[len(d.groups)] for d in drawings]).to(device)
        alike: dict[tuple, list[int]] = {}  # drawings with the same sampling options
        for i, drawing in enumerate(drawings):
            o = drawing.options
            alike.setdefault((o.do_sample, float(o.temperature), o.top_k, float(o.top_p)), []).append(i)
        samplers = [
            (UniTokCodeSampler(drawings[places[0]].options.warpers()), torch.tensor(places, device=device))
            for places in alike.values()
        ]

        def choose(logits: torch.Tensor, k: int) -> torch.Tensor:
            logits = logits.float()
            plain = logits[firsts]
            guided = plain + sum(weights[:, i, None] * (plain - logits[other]) for i, other in enumerate(others))
            guided = keep_plausible(guided, plain, least)
            if len(samplers) == 1:
                return samplers[0][0](guided, noise[:, k])[owners]
            codes = torch.empty_like(firsts)
            for sampler, places in samplers:
                codes[places] = sampler(guided[places], noise[places, k])
            return codes[owners]

        codes = self._parts.depth_head.generate(states, choose, passes)[firsts]
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
            going_on.sort(key=lambda drawing: drawing.rows[0].slot)
            for drawing, embeds in zip(going_on, self._embed(going_on)):
                for row in drawing.rows:
                    row.push(embeds)

    def _embed(self, drawings: list[Drawing]) -> torch.Tensor:
        """Embed the latest codes of each drawing, (N, 1, D)."""
        codes = torch.stack([drawing.groups[-1] for drawing in drawings])
        slots = [drawing.rows[0].slot for drawing in drawings]
        positions = [len(drawing.groups) - 1 for drawing in drawings]
        (layer,), device = self._embedder_cache.layers, codes.device

        def embedded(codes, slots, positions, end=layer.max_length, slot_range=None) -> torch.Tensor:
            layer.place(slots, positions, end, slot_range)
            return self._parts.embedder(codes[:, :, None], self._embedder_cache)

        if self._recorded is not None:
            codes, (slots, positions) = self._recorded.fill(codes), self._recorded.fill_slots(slots, positions, device)
            (step,) = self._recorded.get(("embedder", len(codes)), lambda: [embedded])
            return step(codes, slots, positions)[: len(drawings)]
        indices, end = torch.tensor(slots, device=device), max(positions) + 1
        return embedded(codes, indices, torch.tensor(positions, device=device)[:, None], end, range_of(slots))

    def _bring_on_answers(self, answers: list[Answer]) -> None:
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

    def _finish(self, request: Request, result: torch.Tensor) -> None:
        self._leave(request)
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(result.clone())

    # --- checks that the engine gives the model's logits ---

    def _can_batch(self) -> bool:
        try:
            return self._is_exact()
        except (RuntimeError, TypeError, ValueError):  # such as a model that needs a 2-D mask for its biases
            return False

    @torch.inference_mode()
    def _is_exact(self) -> bool:
        """Return whether batches of rows with unequal lengths give the same logits as the model alone."""
        model = self.model
        ids = torch.arange(8, device=model.device) % model.get_input_embeddings().num_embeddings
        embeds = model.get_input_embeddings()(ids)
        rows = [Row(embeds[:3], slot=0), Row(embeds, slot=1)][: self.max_rows]
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
    """Return the length of the common prefix of two prompts, (T, D) and (T', D)."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).all(dim=1).cumprod(dim=0).sum())


__all__ = ["QueueFull", "UniTokEngine"]
