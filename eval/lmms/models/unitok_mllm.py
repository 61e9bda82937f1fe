"""`UniTokMLLMForConditionalGeneration` as a model of lmms-eval.

Greedy answers do not depend on the batch; sampled ones are drawn one at a time, each from a seed of its own. A task's
`do_sample` decides where it is given; without it a temperature above 0 means sampling, as is usual in lmms-eval.
"""

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cached_property
from itertools import zip_longest

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.caching.response_cache import extract_gen_kwargs
from lmms_eval.protocol import ChatMessages
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria
from transformers.generation import StopStringCriteria

from eval.lmms.answers import AnswerLog
from unitok_mllm import UniTokMLLMForConditionalGeneration
from unitok_mllm.devices import AUTO, find_device
from unitok_mllm.inference import check_model


MAX_NEW_TOKENS = 1024  # where a task names none
GENERATION_OPTIONS = (
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("num_beams", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size"),
)


def generation_options(gen_kwargs: dict) -> tuple[dict, list[str]]:
    """A task's generation settings as options of `generate`, and the strings that end an answer.

    What `generate` does not know (`image_aspect_ratio`, ...) is left out.
    """
    options = {name: gen_kwargs[name] for name in GENERATION_OPTIONS if gen_kwargs.get(name) is not None}
    options.setdefault("max_new_tokens", gen_kwargs.get("max_gen_toks", MAX_NEW_TOKENS))
    temperature = options.get("temperature")
    options["do_sample"] = options.get("do_sample", bool(temperature)) and temperature != 0
    if not options["do_sample"]:
        options |= dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))
    until = gen_kwargs.get("until") or []
    return options, [until] if isinstance(until, str) else [stop for stop in until if stop]


def user_content(text: str, images: list[Image.Image], image_token: str) -> list[dict]:
    """The content of a user's turn: images where the text has their tokens; before the text, where numbers differ."""
    pieces = text.split(image_token)
    if len(pieces) != len(images) + 1:
        pieces = [""] * len(images) + ["".join(pieces)]
    content = []
    for piece, image in zip_longest(pieces, images):
        content += [{"type": "text", "text": piece}] if piece else []
        content += [{"type": "image", "image": image}] if image is not None else []
    return content


class StopAfterPrompt(StoppingCriteria):
    """The library's stop strings, looked for after the prompt alone."""

    def __init__(self, tokenizer, until: list[str], prompt_length: int):
        self.stop_strings, self.prompt_length = StopStringCriteria(tokenizer, until), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.stop_strings(input_ids[:, self.prompt_length :], scores)


class UniTokMLLM(lmms):
    """Text and images in one user turn, as most tasks ask; also multiple choice by likelihood.

    Args:
        pretrained: the folder of model and processor.
        batch_size: requests at a time, in each process.
        device: see `find_device`; "auto" is accelerate's choice for this process.
        dtype: "auto" for that of the folder, "float32", "bfloat16", ...
        answers: a path; answers are kept in `PATH.RANK.jsonl` batch by batch, and those there are not computed again.
        fingerprint: of what the answers depend on beside their request; others' answers are not taken.
        max_batch_size: of lmms-eval; not used.

    Raises:
        ValueError: the folder is no model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str = AUTO,
        dtype: str = "auto",
        answers: str | None = None,
        fingerprint: str = "",
        max_batch_size: int | None = None,
    ):
        super().__init__()
        check_model(pretrained)
        self.pretrained, self.dtype, self.fingerprint = pretrained, dtype, fingerprint
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        automatic = self.accelerator.device
        self.device = automatic if self.world_size > 1 else find_device(device, automatic)
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.answers = AnswerLog(answers, self.rank)
        self.prompts = {}

    @cached_property
    def model(self) -> UniTokMLLMForConditionalGeneration:
        """Loaded when the first answer is needed; lmms-eval's `clean` frees it after each evaluation."""
        model = AutoModelForImageTextToText.from_pretrained(self.pretrained, dtype=self.dtype)
        return model.to(self.device).eval()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The texts after each request's prompt, up to the first of its stop strings."""

        def answer(conversations: list[list[dict]], batch: list[Instance], seed: int) -> list[str]:
            options, until = generation_options(extract_gen_kwargs(batch[0]))
            return self._generate(conversations, options, until, seed)

        return self._answer_all(requests, answer)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each request's continuation: its mean cross-entropy, and whether it is what greedy decoding gives.

        The loss, not its negative: lmms-eval takes the choice with the least.
        """
        return [tuple(pair) for pair in self._answer_all(requests, self._losses)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        raise NotImplementedError("unitok_mllm has no rounds in which a task (on videos, on web pages) asks anew.")

    def _answer_all(self, requests: list[Instance], answer: Callable) -> list:
        """`answer(conversations, batch, seed)` of all requests that the log has no answer to, logged batch by batch."""
        keys, groups = self._keys(requests), defaultdict(list)
        for key, request in zip(keys, requests):
            if request.task_name not in self.prompts:
                self.prompts[request.task_name] = self.processor.apply_chat_template(
                    self._conversation(request), add_generation_prompt=True
                )
            if key not in self.answers.answers and not request.metadata.get("__padding_only__"):
                groups[json.dumps(extract_gen_kwargs(request), sort_keys=True)].append((key, request))
        count = sum(map(len, groups.values()))
        with tqdm(total=count, desc="answering", disable=self.rank != 0) as bar:
            for gen_kwargs, rows in groups.items():
                rows.sort(key=lambda row: len(row[1].args[0]), reverse=True)  # texts of like length go together
                size = 1 if generation_options(json.loads(gen_kwargs))[0]["do_sample"] else self.batch_size
                for start in range(0, len(rows), size):
                    batch_keys, batch = zip(*rows[start : start + size])
                    conversations = [self._conversation(request) for request in batch]
                    values = answer(conversations, batch, zlib.crc32(batch_keys[0].encode()))
                    self.answers.add(
                        [
                            {
                                "key": key,
                                "task": r.task_name,
                                "doc_id": r.doc_id,
                                "question": r.args[0],
                                "answer": value,
                            }
                            for key, r, value in zip(batch_keys, batch, values)
                        ]
                    )
                    bar.update(len(batch))
        return [self.answers.answers.get(key, "") for key in keys]

    def _keys(self, requests: list[Instance]) -> list[str]:
        """What identifies each request; one that comes several times has a key each time."""
        keys, seen = [], Counter()
        for request in requests:
            texts = [value for value in request.args if isinstance(value, str)]
            parts = self.fingerprint, request.doc_id, request.idx, texts, extract_gen_kwargs(request)
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
            keys.append(f"{digest}-{seen[digest]}")
            seen[digest] += 1
        return keys

    def _document(self, request: Instance) -> dict:
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _conversation(self, request: Instance) -> list[dict]:
        """A request as messages for the processor's chat template."""
        text, _, doc_to_visual = request.args[:3]
        images = doc_to_visual(self._document(request)) or []
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"{request.task_name} shows a {type(image).__name__}; unitok_mllm reads images alone."
                )
        return [{"role": "user", "content": user_content(text, images, self.processor.image_token)}]

    def _inputs(self, conversations: list[list[dict]], **options: bool) -> dict[str, torch.Tensor]:
        """Model inputs, padded on the left; `options` say how a conversation goes on."""
        return self.processor.apply_chat_template(conversations, tokenize=True, return_dict=True, **options).to(
            self.device
        )

    @torch.no_grad()
    def _generate(self, conversations: list[list[dict]], options: dict, until: list[str], seed: int) -> list[str]:
        torch.manual_seed(seed)
        inputs, tokenizer = self._inputs(conversations, add_generation_prompt=True), self.processor.tokenizer
        length = inputs["input_ids"].shape[1]
        generated = self.model.generate(
            **inputs,
            **options,
            stopping_criteria=[StopAfterPrompt(tokenizer, until, length)] if until else [],
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = self.processor.batch_decode(generated[:, length:], skip_special_tokens=True)
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    @torch.no_grad()
    def _losses(self, conversations: list[list[dict]], batch: list[Instance], seed: int) -> list[tuple[float, bool]]:
        answered = []
        for conversation, request in zip(conversations, batch):
            target = request.args[1]
            target = (target if isinstance(target, str) else target(self._document(request))).strip()
            answer = {"role": "assistant", "content": [{"type": "text", "text": target}]}
            answered.append([*conversation, answer])
        inputs = self._inputs(answered, continue_final_message=True)
        prompts = self._inputs(conversations, add_generation_prompt=True)
        lengths = (inputs["attention_mask"].sum(dim=1) - prompts["attention_mask"].sum(dim=1)).tolist()
        position_ids = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        longest = max(lengths)
        logits = self.model(**inputs, position_ids=position_ids, logits_to_keep=longest + 1).logits[:, :-1].float()
        results = []
        for row, targets, length in zip(logits, inputs["input_ids"][:, -longest:], lengths):
            row, targets = row[-length:], targets[-length:]
            greedy = bool((row.argmax(dim=-1) == targets).all())
            results.append((F.cross_entropy(row, targets).item(), greedy))
        return results


class UniTokMLLMChat(UniTokMLLM):
    """Messages as a task writes them: several turns, images between texts."""

    is_simple = False

    def _conversation(self, request: Instance) -> list[dict]:
        messages = ChatMessages(messages=request.args[1](self._document(request)))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(f"{request.task_name} has videos or sounds; unitok_mllm reads images alone.")
        conversation = messages.to_hf_messages()
        for message in conversation:
            for part in message["content"]:
                if part["type"] == "text":  # the parts, not placeholders, say where images go
                    part["text"] = part["text"].replace(self.processor.image_token, "")
        return conversation
