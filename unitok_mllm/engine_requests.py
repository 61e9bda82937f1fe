"""Requests of the engine (drawings and answers), and the rows of the batch that they take."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .drawing_unitok import UniTokDrawingOptions
from .fast_drawing_unitok import UniTokDrawingCaches


@dataclass(eq=False, repr=False)
class Row:
    """A sequence in a slot.

    Attributes:
        prompt: embeddings of the prompt, (T, D).
        hashes: a hash of each of them, (T,), int64.
        slot: index of the slot that holds its keys and values.
        length: number of positions that the LLM has processed.
        state: last hidden state of the LLM, (D,); None while inputs are pending.
        pending: embeddings that the LLM has not processed yet, (T', D), if there is no state.
        caches: the row's own caches, if rows are not batched.
    """

    prompt: torch.Tensor
    hashes: torch.Tensor = field(init=False)
    slot: int = -1
    length: int = 0
    state: torch.Tensor | None = None
    pending: torch.Tensor = None
    caches: UniTokDrawingCaches | None = None

    def __post_init__(self):
        self.pending = self.prompt
        as_bytes = self.prompt.detach().contiguous().view(torch.uint8).cpu().numpy()
        self.hashes = torch.tensor([hash(position.tobytes()) for position in as_bytes], dtype=torch.long)

    def push(self, embeds: torch.Tensor) -> None:
        """Let the LLM process further embeddings, (T, D), in the next step."""
        self.pending, self.state = embeds, None


@dataclass(eq=False, repr=False)
class Request:
    """What drawings and answers have in common.

    Attributes:
        rows: rows of the request; the prompt's comes first.
        length: final length of the longest row, in positions.
        tell: called in the engine's thread with each new token, (), or the codes of each new position, (K,).
        future: future of the result.
    """

    rows: list[Row]
    length: int
    tell: Callable[[torch.Tensor], None] | None
    future: Future = field(default_factory=Future)

    @property
    def is_ready(self) -> bool:
        """Whether the LLM has processed all inputs, so that the next token or codes can be chosen."""
        return all(row.state is not None for row in self.rows)


@dataclass(eq=False, repr=False)
class Drawing(Request):
    """A request for one image.

    Attributes:
        options: sampling options.
        weights: guidance scale minus 1 of each row except the first.
        noise: random numbers for sampling, (L, K), uniform in [0, 1).
        groups: codes of each position so far, (K,) each.
    """

    options: UniTokDrawingOptions = None
    weights: list[float] = None
    noise: torch.Tensor = None
    groups: list[torch.Tensor] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Answer(Request):
    """A request for a text.

    Attributes:
        ids: token ids of the prompt and the answer so far, (1, T).
        prompt_length: number of tokens of the prompt.
        processors: logits processors.
        criteria: stopping criteria.
        random: random generator for sampling; None for greedy decoding.
    """

    ids: torch.Tensor = None
    prompt_length: int = 0
    processors: LogitsProcessorList = None
    criteria: StoppingCriteriaList = None
    random: torch.Generator | None = None
