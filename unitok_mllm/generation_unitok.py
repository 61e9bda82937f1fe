"""Generation: text by the library's own loop, images by L steps of the LLM with K depth steps each.

Classifier-free guidance (https://arxiv.org/abs/2207.12598) uses `logits = uncond + scale * (cond - uncond)` for a
scale above 1. Both branches run in one batch and continue with the same codes.

Edits have two null prompts, the picture alone and the instruction alone. Each has its own scale and adds
`(scale - 1) * (cond - other)`. The two scales are those of InstructPix2Pix (https://arxiv.org/abs/2211.09800), whose
formula differs: it compares the picture alone with a prompt without either.
"""

import copy
import functools
from dataclasses import dataclass
from numbers import Integral

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Cache, GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessorList

from .drawing_unitok import (
    TEXT_OPTIONS,
    UniTokCodeSampler,
    UniTokDrawing,
    UniTokDrawingOptions,
    UniTokGuidance,
    has_keys,
    image_generation,
    uniform_noise,
)
from .fast_drawing_unitok import UniTokDrawingParts, prepare_drawing
from .interleaved_unitok import UniTokAnswerEnd, UniTokAnswerStream, check_options
from .modeling_unitok import UniTokImageFeatures
from .ranking_unitok import UniTokDrawingOutput, check_ranking, choose_drawings, score_drawings
from .streaming_unitok import UniTokImageStreamer, streamers_told


IMAGE_INPUTS = ("pixel_values", "image_codes")


def is_used(cache: Cache | None) -> bool:
    """Return whether a cache holds earlier tokens. The library's paged caches, which serve only texts, count as used."""
    if cache is None or not isinstance(cache, Cache):
        return cache is not None
    return cache.get_seq_length() > 0 if has_keys(cache) else cache.has_previous_state()


@dataclass
class UniTokInterleavedOutput:
    """Output of `generate_interleaved`, with an entry for each prompt.

    Attributes:
        sequences: the new ids, (T,) each: text, and for each image the opening token, L placeholders, the closing
            token.
        image_codes: the codes of the drawn images, in order, (N, K, L) each.
    """

    sequences: list[torch.Tensor]
    image_codes: list[torch.Tensor]


class UniTokLogitsProcessorList(LogitsProcessorList):
    """Logits processors. Those of the library get prompts without image placeholders.

    A placeholder's id may lie beyond the vocabulary. It is replaced by the token that opens an image, which is in the
    prompt anyway, before each image.
    """

    placeholder: int
    boi_token_id: int

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        words = input_ids.masked_fill(input_ids == self.placeholder, self.boi_token_id)
        for processor in self:
            ids = words if type(processor).__module__.startswith("transformers.") else input_ids
            scores = LogitsProcessorList([processor])(ids, scores, **kwargs)
        return scores


class UniTokGenerationMixin(GenerationMixin):
    """`generate` in three modes: "text" (the default), "image" and "interleaved"."""

    def generate(self, inputs: torch.Tensor | None = None, *args, generation_mode: str = "text", **kwargs):
        """Generate text, the codes of one image for each prompt, or text with images.

        Args:
            inputs: prompt ids (B, T), also as `input_ids=`.
            args: arguments of the mode's method.
            generation_mode: "text" for transformers' own `generate`, "image" for `generate_image_codes`, "interleaved"
                for `generate_interleaved`.
            kwargs: arguments of the mode's method.

        Returns:
            "text": as transformers. "image": codes (B * num_return_sequences, K, L), int64, or a `UniTokDrawingOutput`
            with `return_dict_in_generate=True`. "interleaved": a `UniTokInterleavedOutput`.

        Raises:
            ValueError: another mode; see the mode's method.
        """
        if generation_mode == "image":
            with streamers_told(kwargs.get("streamer")):
                options = {name: value for name, value in kwargs.items() if name not in TEXT_OPTIONS}
                return self.generate_image_codes(options.pop("input_ids", inputs), *args, **options)
        if generation_mode == "interleaved":
            return self.generate_interleaved(kwargs.pop("input_ids", inputs), *args, **kwargs)
        with streamers_told(kwargs.get("streamer"), error_only=True):
            if generation_mode != "text":
                raise ValueError(f"generation_mode is 'text', 'image' or 'interleaved', got {generation_mode!r}.")
            if "image_generation" in kwargs:  # as an option it would be ignored
                raise ValueError("image_generation belongs in a generation_config; pass drawing options as arguments.")
            input_ids = kwargs.get("input_ids", inputs)
            if input_ids is not None:
                self._check_room(input_ids, 1)
            return super().generate(inputs, *args, **kwargs)

    def adjust_generation_fn(self, *args, visual=None, language_model=None, **kwargs) -> None:
        """Load the generation config as the library does, but do not pass it the constructor's modules as options."""
        super().adjust_generation_fn(*args, **kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        """Embed the images once, before the prompt's first pass.

        The images come as pixels, as codes, or as features of the model that this one drafts for. The codes of the
        latter are embedded again, by this model.
        """
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        given = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if images and given is not None:
            raise ValueError("Give images either raw or as mm_encoder_outputs, not both.")
        if isinstance(given, UniTokImageFeatures) and given.image_codes is not None:
            images = {"image_codes": given.image_codes}
        if images:
            model_kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**images, return_dict=True)}
        return model_kwargs

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, cache=None, **kwargs):
        """Prepare the inputs of a step, as the library does, with two corrections.

        The library does not recognise a draft model's first pass over the prompt, and drops its images. It also passes
        the tokenizers for `stop_strings` and for drafts to the model.
        """
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        if kwargs.get("mm_encoder_outputs") and cache is not None and not is_used(cache):
            is_first_iteration = True
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, cache=cache, **kwargs
        )
        if isinstance(cache, Cache) and not has_keys(cache) and is_used(cache):
            model_inputs["attention_mask"] = None  # a recurrent state already excludes the padding
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Expand the inputs, as the library does; images without placeholders, which it drops, are an error."""
        images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if images is not None:
            self.images_per_sample(input_ids, *images.pooler_output.shape[:2])
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _get_logits_processor(
        self, generation_config, *args, encoder_input_ids=None, **kwargs
    ) -> UniTokLogitsProcessorList:
        """Return the library's processors. They see no placeholder and never choose one."""
        placeholder, boi = self.config.image_token_id, self.config.boi_token_id
        if encoder_input_ids is not None:
            encoder_input_ids = encoder_input_ids.masked_fill(encoder_input_ids == placeholder, boi)
        generation_config = copy.copy(generation_config)
        generation_config.suppress_tokens = [*(generation_config.suppress_tokens or []), placeholder]
        processors = UniTokLogitsProcessorList(
            super()._get_logits_processor(generation_config, *args, encoder_input_ids=encoder_input_ids, **kwargs)
        )
        processors.placeholder, processors.boi_token_id = placeholder, boi
        return processors

    def set_image_generation(self, **options) -> None:
        """Set the model's defaults of drawing, in the generation config that is saved with it.

        Args:
            options: any of the first eight of `UniTokDrawingOptions`.

        Raises:
            ValueError: another option, or one outside its range.

        Example:
            >>> model.set_image_generation(guidance_scale=2.0, top_k=50)
        """
        config = copy.deepcopy(self.generation_config)
        config.image_generation = options
        config._from_model_config = False  # otherwise loading the config drops the entry
        image_generation(config)
        self.generation_config = config

    def drawing_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        ranking_input_ids: torch.Tensor | None = None,
        **options,
    ) -> tuple[UniTokDrawingOptions, UniTokGuidance, torch.Tensor]:
        """Prepare a drawing. Arguments and errors are those of `generate_image_codes`.

        Args:
            input_ids, attention_mask, pixel_values, image_codes: see `generate_image_codes`.
            generation_config, ranking_input_ids: see `generate_image_codes`.
            options: its options, and its null prompts by name (`unconditional_input_ids` ...).

        Returns:
            Its options, its prompts as one batch, and the noise that chooses its codes, (B * num_samples, positions,
            K).
        """
        others = {"guidance_scale": ["unconditional"], "image_guidance_scale": ["text_alone"]}
        for prompt in others.values():
            prompt += [options.pop(f"{prompt[0]}_{part}", None) for part in ("input_ids", "attention_mask")]
        if others["guidance_scale"][1] is None and self.config.unconditional_prompt_ids is not None:
            others["guidance_scale"][1] = input_ids.new_tensor([self.config.unconditional_prompt_ids])
        missing = [scale for scale, (_, ids, _) in others.items() if ids is None]
        missing += ["candidates"] if ranking_input_ids is None else []
        options = UniTokDrawingOptions.resolve(self.generation_config, generation_config, missing, **options)
        if options.candidates > 1:
            self._check_ranking_texts(ranking_input_ids, len(input_ids))
        num_positions = options.num_positions or self.config.num_image_positions
        input_ids, attention_mask = self._image_prompt(input_ids, attention_mask, num_positions)
        branches = {name: (getattr(options, scale), *prompt) for scale, (name, *prompt) in others.items()}
        guidance = self._guidance(*self.embed(input_ids, pixel_values, image_codes), attention_mask, branches, options)
        noise = self._noise(options, len(input_ids), num_positions).to(input_ids.device)
        return options, guidance, noise

    @torch.no_grad()
    def generate_image_codes(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unconditional_input_ids: torch.Tensor | None = None,
        unconditional_attention_mask: torch.Tensor | None = None,
        text_alone_input_ids: torch.Tensor | None = None,
        text_alone_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | list | None = None,
        stopping_criteria: StoppingCriteriaList | list | None = None,
        streamer: UniTokImageStreamer | None = None,
        progress: bool = False,
        parts: UniTokDrawingParts | None = None,
        ranking_input_ids: torch.Tensor | None = None,
        ranking_attention_mask: torch.Tensor | None = None,
        return_dict_in_generate: bool | None = None,
        **options,
    ) -> torch.Tensor | UniTokDrawingOutput:
        """Draw one image, or `num_return_sequences` images, for each prompt.

        With `candidates` above `num_return_sequences`, that many are drawn in one batch, and the best are returned:
        those whose embeddings (by the visual tokenizer) are nearest to that of the prompt's text. Candidate j is sample
        j of its prompt, the same as row j with `num_return_sequences` alone. So candidate 0 is the plain drawing.

        Args:
            input_ids: (B, T), prompts that end with the token that opens an image, padded on the left.
            attention_mask: (B, T), 0 for padding.
            unconditional_input_ids: (1 or B, T'), the null prompts of guidance, without images or with those of
                `input_ids`; the processor makes them. Used only with a `guidance_scale` above 1. Without them (and
                without the config's `unconditional_prompt_ids`), the model's own `guidance_scale` is ignored, and one
                that the call asks for is an error.
            unconditional_attention_mask: (1 or B, T').
            text_alone_input_ids: (1 or B, T''), the null prompts of `image_guidance_scale`: the prompts without their
                images.
            text_alone_attention_mask: (1 or B, T'').
            pixel_values: (N, 3, H, W), images in the prompts, see `UniTokMLLMForConditionalGeneration.embed`.
            image_codes: (N, K, L), instead of pixels.
            generation_config: options of the drawing, see `UniTokDrawingOptions.resolve`.
            logits_processor: processors of the logits of each code, see `UniTokCodeSampler`. With any, no step is
                recorded as a CUDA graph.
            stopping_criteria: called after each position with the codes so far, (B * samples, l * K), and None for
                scores; samples is the larger of `candidates` and `num_return_sequences`. The drawing ends early when
                all rows have been stopped.
            streamer: gets the codes so far of all samples after each position, and may stop the drawing.
            progress: show a progress bar.
            parts: `prepare_drawing(model)`, made once for several drawings; None to make them for this one.
            ranking_input_ids: (B, T'), the texts that `candidates` are ranked by, see `score_drawings`. The processor
                makes them from descriptions, and for edits and other prompts with images from its `ranking_text`.
                Without them the model's own `candidates` are ignored, and those that the call asks for are an error.
            ranking_attention_mask: (B, T').
            return_dict_in_generate: True to return also all candidates and their scores.
            options: those of `UniTokDrawingOptions`: `guidance_scale`, `temperature`, `seed` ... Options left out (or
                None) come from `generation_config`, then from `image_generation` in the model's own generation config.

        Returns:
            (B * num_return_sequences, K, L), int64, the drawings of a prompt next to each other; with `candidates` the
            best first. A drawing that the streamer or the criteria stopped has fewer than L positions: `decode_images`
            refuses it, and candidates are not ranked (the first ones are returned). With `return_dict_in_generate`, a
            `UniTokDrawingOutput`.

        Raises:
            ValueError: an option outside its range, a prompt that does not end with the token that opens an image,
                guidance without a null prompt, or candidates without a text to rank by or a text tower that reads it.
            TypeError: an option that drawing does not know.
        """
        options, guidance, noise = self.drawing_inputs(
            input_ids,
            attention_mask,
            pixel_values,
            image_codes,
            generation_config,
            ranking_input_ids,
            unconditional_input_ids=unconditional_input_ids,
            unconditional_attention_mask=unconditional_attention_mask,
            text_alone_input_ids=text_alone_input_ids,
            text_alone_attention_mask=text_alone_attention_mask,
            **options,
        )
        num_positions = noise.shape[1]
        processors = LogitsProcessorList(logits_processor or [])
        drawing = UniTokDrawing(
            prepare_drawing(self) if parts is None else parts,
            guidance,
            UniTokCodeSampler(options.warpers(), processors),
            num_positions,
            options.use_cache,
            options.cuda_graph and not processors,
        )
        criteria, is_over = StoppingCriteriaList(stopping_criteria or []), torch.zeros(len(noise), dtype=torch.bool)
        groups = [drawing.prefill(noise[:, 0])]
        with tqdm(total=num_positions, desc="drawing", disable=not progress, leave=False) as bar:
            while True:
                if progress and input_ids.device.type == "cuda":
                    torch.cuda.synchronize(input_ids.device)  # otherwise the bar would run ahead
                bar.update()
                is_stopped = streamer is not None and streamer.put(torch.stack(groups, dim=2))
                if criteria:
                    is_over |= criteria(torch.stack(groups, dim=1).flatten(1), None).cpu()
                if is_stopped or is_over.all() or len(groups) == num_positions:
                    break
                groups.append(drawing.step(groups, noise[:, len(groups)]))
        output = UniTokDrawingOutput(torch.stack(groups, dim=2))
        if options.candidates > 1:
            candidates = output.codes.unflatten(0, (-1, options.candidates))
            if len(groups) == num_positions:
                scores = score_drawings(self.visual, candidates, ranking_input_ids, ranking_attention_mask)
                output = choose_drawings(candidates, scores, options.num_return_sequences)
            else:
                output.codes = candidates[:, : options.num_return_sequences].flatten(0, 1)
        return output if return_dict_in_generate else output.codes

    def _check_ranking_texts(self, input_ids: torch.Tensor | None, num_prompts: int) -> None:
        """Check the texts (B, T) that candidates are ranked by.

        Raises:
            ValueError: there are none, or not one for each prompt; see `check_ranking`.
        """
        if self.visual.config.text_config is not None and input_ids is None:
            raise ValueError(
                "candidates above 1 needs ranking_input_ids, the texts to rank by: make prompts with processor(text=..., "
                "generation_mode='image'). For prompts with images, such as edits, describe the result in ranking_text."
            )
        if input_ids is not None and len(input_ids) != num_prompts:
            raise ValueError(f"Got {len(input_ids)} texts to rank by, but {num_prompts} prompts.")
        check_ranking(self.visual, input_ids)

    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unconditional_input_ids: torch.Tensor | None = None,
        unconditional_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        max_images: int = 4,
        image_options: dict | None = None,
        generation_config: GenerationConfig | None = None,
        streamer=None,
        **text_options,
    ) -> UniTokInterleavedOutput:
        """Generate text by the library's own loop, and draw an image wherever the model opens one.

        The prompts are processed one after another, since their answers differ in length.

        Args:
            input_ids: (B, T), prompts, padded on the left.
            attention_mask: (B, T), 0 for padding.
            unconditional_input_ids: (1 or B, T'), see `generate_image_codes`.
            unconditional_attention_mask: (1 or B, T').
            pixel_values: (N, 3, H, W), images in the prompts.
            image_codes: (N, K, L), instead of pixels.
            max_new_tokens: most text tokens for each prompt; images do not count. None for 256.
            max_images: most images for each prompt. After that the model cannot open another one.
            image_options: of `generate_image_codes`: `guidance_scale`, `temperature`, `top_k`, `seed` ... Image n of a
                prompt (from 0) is drawn with the seed plus n. Options left out are as in `generate_image_codes`; a
                call's `generation_config` may have them as `image_generation`. Their `streamer` gets all images. If it
                stops a drawing, the answer ends before that image.
            generation_config: options of transformers' `generate` that are in `interleaved_unitok.TEXT_OPTIONS`.
            streamer: gets the text of the answer to a single prompt, before and after each image.
            text_options: the same options as arguments. They apply to the whole answer: `min_new_tokens` counts all
                its text. `max_time` includes the drawings, of which a started one is finished.

        Returns:
            The new ids and the codes of the drawn images, for each prompt.

        Raises:
            ValueError: see `generate_image_codes`; `max_new_tokens` or `max_images` outside its range; an option that
                this mode does not take, which is named; a `streamer` for several prompts.
        """
        image_options = dict(image_options or {})
        with streamers_told(streamer, image_options.get("streamer")):
            text_options |= {"max_new_tokens": max_new_tokens, "streamer": streamer}
            text_options = {name: value for name, value in text_options.items() if value is not None}
            if max_images < 0 or max_new_tokens is not None and max_new_tokens < 1:
                raise ValueError(
                    f"max_new_tokens must be at least 1 and max_images at least 0, got {max_new_tokens} and {max_images}."
                )
            check_options(text_options, generation_config, self.generation_config, image_options)
            config, others = self._prepare_generation_config(generation_config, **text_options)
            if config.max_new_tokens is None:
                config.max_new_tokens = 256
            batch = len(input_ids)
            if streamer is not None and batch > 1:
                raise ValueError(f"A streamer shows the answer to one prompt, got {batch} prompts.")
            self._check_room(input_ids, 1)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            image_codes = self.encode_images(pixel_values) if pixel_values is not None else image_codes
            if image_codes is None:
                image_codes = input_ids.new_zeros(0, self.depth_head.num_codebooks, self.config.num_image_positions)
            of_row = image_codes.split(self.images_per_sample(input_ids, len(image_codes), image_codes.shape[-1]))
            unconditional = {
                "unconditional_input_ids": unconditional_input_ids,
                "unconditional_attention_mask": unconditional_attention_mask,
            }
            unconditional = {name: value for name, value in unconditional.items() if value is not None}
            for value in unconditional.values():
                if len(value) not in (1, batch):
                    raise ValueError(f"Got {len(value)} unconditional prompts for a batch of {batch}.")
            seed = image_options.pop("seed", None)
            seeds = [None] * batch if seed is None else self._seeds(seed, batch)
            end = UniTokAnswerEnd(self.config.boi_token_id, others.pop("stopping_criteria", None), config.max_time)
            config.max_time = None
            allowed = others.pop("prefix_allowed_tokens_fn", None)

            output = UniTokInterleavedOutput([], [])
            parts = functools.cache(lambda: prepare_drawing(self))  # made with the first image, for all of them
            for row, (ids, mask, codes) in enumerate(zip(input_ids, attention_mask, of_row)):
                prompt = ids[mask.bool()][None]
                if allowed is not None:
                    others["prefix_allowed_tokens_fn"] = lambda _, ids, row=row: allowed(row, ids)
                places = {
                    name: value[row : row + 1] if len(value) > 1 else value for name, value in unconditional.items()
                }
                sequence, codes = self._interleave_one(
                    prompt,
                    codes,
                    max_images,
                    config,
                    end,
                    dict(others),
                    {**image_options, **places, "seed": seeds[row]},
                    parts,
                )
                output.sequences.append(sequence[0, prompt.shape[1] :])
                output.image_codes.append(codes)
            return output

    def _interleave_one(self, sequence, known_codes, max_images, config, end, options, image_options, parts):
        """Answer one prompt (1, T). Returns prompt and answer (1, T'), and the drawn codes (N, K, L)."""
        boi, eoi, placeholder = self.config.boi_token_id, self.config.eoi_token_id, self.config.image_token_id
        suppressed = [*(self.generation_config.suppress_tokens or []), *(config.suppress_tokens or [])]
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        seed, drawn, room = image_options.pop("seed"), known_codes[:0], config.max_new_tokens
        streamer, image_streamer = options.pop("streamer", None), image_options.pop("streamer", None)
        streamer = None if streamer is None else UniTokAnswerStream(streamer)
        image_streamer = None if image_streamer is None else UniTokAnswerStream(image_streamer)
        while room > 0:
            may_draw = len(drawn) < max_images
            codes = torch.cat([known_codes, drawn])
            length = sequence.shape[1]
            piece = copy.deepcopy(config)
            piece.max_length = piece.min_length = None
            piece.max_new_tokens = room
            piece.min_new_tokens = max(0, (config.min_new_tokens or 0) - (config.max_new_tokens - room))
            piece.suppress_tokens = suppressed if may_draw else [*suppressed, boi]
            sequence = super().generate(
                sequence,
                piece,
                attention_mask=torch.ones_like(sequence),
                image_codes=codes if len(codes) else None,
                stopping_criteria=StoppingCriteriaList([end]),
                streamer=streamer,
                **options,
            )
            room -= sequence.shape[1] - length
            if sequence[0, -1] != boi or boi in ends:
                break
            new = None
            if may_draw and not end.is_over:
                new = self.generate_image_codes(
                    sequence,
                    image_codes=codes if len(codes) else None,
                    seed=None if seed is None else seed + len(drawn),
                    generation_config=GenerationConfig(image_generation=vars(config).get("image_generation")),
                    streamer=image_streamer,
                    parts=parts(),
                    **image_options,
                )
            if new is None or new.shape[-1] < self.config.num_image_positions:
                sequence = sequence[:, :-1]  # without its image, the opening token goes too
                break
            drawn = torch.cat([drawn, new])
            image = sequence.new_tensor([*[placeholder] * new.shape[-1], eoi])
            sequence = torch.cat([sequence, image[None]], dim=1)
        return sequence, drawn

    def _noise(self, options: UniTokDrawingOptions, num_prompts: int, num_positions: int) -> torch.Tensor:
        """Draw the noise of the codes, (prompts * num_samples, positions, K); zeros for greedy drawings."""
        shape = (num_positions, self.depth_head.num_codebooks)
        if not options.do_sample:
            return torch.zeros(num_prompts * options.num_samples, *shape)
        return uniform_noise(self._seeds(options.seed, num_prompts), options.num_samples, shape)

    @staticmethod
    def _seeds(seed: int | list[int] | None, num_prompts: int) -> list[int]:
        if seed is None:
            return torch.randint(2**31, (num_prompts,)).tolist()
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * num_prompts
        if len(seeds) != num_prompts:
            raise ValueError(f"Got {len(seeds)} seeds for {num_prompts} prompts.")
        if not all(isinstance(one, Integral) and one >= 0 for one in seeds):
            raise ValueError(f"seed must be an integer of at least 0, or one for each prompt, got {seed}.")
        return seeds

    def _image_prompt(self, input_ids, attention_mask, num_positions):
        """Return prompts (B, T) that all open an image, and their mask.

        If none of the prompts does, the config's `image_prompt_ids` are appended.

        Raises:
            ValueError: only some prompts open an image, or there is no room for an image.
        """
        boi, ids = self.config.boi_token_id, self.config.image_prompt_ids
        if ids is not None and not (input_ids[:, -1] == boi).any():
            input_ids = torch.cat([input_ids, input_ids.new_tensor([ids]).repeat(len(input_ids), 1)], dim=1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, len(ids)), value=1)
        self._check_room(input_ids, num_positions)
        if not (input_ids[:, -1] == boi).all():
            raise ValueError(
                f"Each prompt must end with the token that opens an image ({boi}): make prompts "
                "with processor(text=..., generation_mode='image'), padded on the left (for a pipeline, "
                "processor_kwargs={'generation_mode': 'image'})."
            )
        return input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask

    def _check_room(self, input_ids: torch.Tensor, num_positions: int) -> None:
        """Check that prompts (B, T) and `num_positions` further tokens fit into the LLM's positions.

        Raises:
            ValueError: they do not fit.
        """
        most = self.config.llm_sizes.max_positions
        if most is not None and input_ids.shape[1] + num_positions > most:
            raise ValueError(
                f"The prompt is too long: its {input_ids.shape[1]} tokens and {num_positions} more do not fit into the "
                f"model's {most} positions."
            )

    def _guidance(self, inputs_embeds, image_codes, attention_mask, others, options) -> UniTokGuidance:
        """Build the batch of prompts and null prompts. `others` has scale (1 for none), ids and mask by name."""
        branches, scales = [(inputs_embeds, attention_mask)], []
        for name, (scale, ids, mask) in others.items():
            if scale > 1:
                branches.append(self._other_branch(name, ids, mask, image_codes, len(inputs_embeds)))
                scales.append(scale)
        return UniTokGuidance(branches, scales, options.num_samples, options.log_plausibility)

    def _other_branch(self, name, input_ids, attention_mask, image_codes, batch):
        """Embed the null prompts of one guidance. Returns embeddings and mask, a row for each prompt."""
        if input_ids is None:
            scale_name = "guidance_scale" if name == "unconditional" else "image_guidance_scale"
            raise ValueError(
                f"A {scale_name} above 1 needs {name}_input_ids: make prompts with "
                f"processor(text=..., generation_mode={'image' if name == 'unconditional' else 'edit'!r})."
            )
        if batch % len(input_ids):
            raise ValueError(f"Got {len(input_ids)} {name.replace('_', ' ')} prompts for a batch of {batch}.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        has_images = (input_ids == self.config.image_token_id).any()
        inputs_embeds, _ = self.embed(input_ids, image_codes=image_codes if has_images else None)
        repeats = batch // len(input_ids)
        return inputs_embeds.repeat_interleave(repeats, dim=0), attention_mask.repeat_interleave(repeats, dim=0)


__all__ = ["UniTokGenerationMixin", "UniTokInterleavedOutput"]
