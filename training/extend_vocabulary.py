"""Give a model with a byte-level BPE more tokens, for the words of new texts, without changing what it has learned.

    python -m training.extend_vocabulary unitok_mllm/checkpoints/tiny runs/tiny-extended \\
        --captions runs/data/emoji/train_captions.jsonl --vocab-size 2048

New merges follow those of the tokenizer, so that old tokens keep their ids. A new token's embedding, in the LLM and in
the visual tokenizer's text tower, starts as the mean of the embeddings of the old tokens that spell it.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.arguments import check_source
from training.errors import one_line_errors
from training.release import save_release
from training.text_tokenizer import read_captions
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.outputs import check_whole_folder
from unitok_mllm.typer_apps import script_app


def merge(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of a pair in the pieces of a word, from left to right."""
    merged, i = [], 0
    while i < len(pieces):
        joins = pieces[i : i + 2] == pair
        merged.append("".join(pair) if joins else pieces[i])
        i += 2 if joins else 1
    return tuple(merged)


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Extend a BPE tokenizer with merges of the most frequent pairs of tokens (ties in alphabetical order).

    Args:
        tokenizer: byte-level BPE tokenizer.
        texts: texts in which the pairs are counted.
        vocab_size: maximum vocabulary size of the result.

    Returns:
        A tokenizer with `vocab_size` tokens, or fewer if every word of the texts has become one token.

    Raises:
        ValueError: the tokenizer is not a BPE, or already has that many tokens.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE":
        raise ValueError(f"Only a BPE tokenizer can be extended, got a {state['model']['type']}.")
    if len(tokenizer) >= vocab_size:
        raise ValueError(
            f"The tokenizer already has {len(tokenizer)} tokens; vocab_size must be larger, got {vocab_size}."
        )
    counts = Counter(word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    words = {word: tuple(token.value for token in backend.model.tokenize(word)) for word in counts}
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for number in range(len(tokenizer), vocab_size):
        pairs = Counter()
        for word, pieces in words.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        words = {word: merge(pieces, pair) for word, pieces in words.items()}
        merges.append(list(pair))
        vocabulary["".join(pair)] = number
    extended = type(backend).from_str(json.dumps(state))
    return type(tokenizer)(tokenizer_object=extended, **tokenizer.init_kwargs)


def extend_embeddings(model: PreTrainedModel, spellings: dict[int, list[int]]) -> None:
    """Set the embedding of each new token to the mean embedding of the old tokens that spell it.

    Args:
        model: model whose embeddings are changed in place.
        spellings: ids of the old tokens that spell a new token, by its id.
    """
    if max(spellings) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(spellings) + 1, mean_resizing=False)
    for embeddings in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
        with torch.no_grad():
            for number, spelling in spellings.items():
                embeddings.weight[number] = embeddings.weight[spelling].mean(dim=0)


app = script_app(help=__doc__)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="folder or hub name of an MLLM")],
    folder: Annotated[Path, typer.Argument(help="folder to write the extended model to")],
    captions: Annotated[
        list[Path], typer.Option(help="JSONL file with a caption on each line; repeat for several files")
    ],
    vocab_size: Annotated[int, typer.Option(help="largest vocabulary of the extended model")] = 2048,
) -> None:
    """Write MODEL, an MLLM's folder, to FOLDER, with new tokens for the words of the captions."""
    if not model:
        raise typer.BadParameter("MODEL is empty")
    check_source("MODEL", model)
    check_whole_folder(folder, replaces_model=True)
    texts = [before + caption for path in captions for caption in read_captions(path) for before in ("", " ")]
    processor = UniTokMLLMProcessor.from_pretrained(model)
    old = processor.tokenizer
    processor.tokenizer = extend_tokenizer(old, texts, vocab_size)
    mllm = UniTokMLLMForConditionalGeneration.from_pretrained(model)
    added = range(len(old), len(processor.tokenizer))
    spellings = {i: old(processor.tokenizer.decode([i]), add_special_tokens=False)["input_ids"] for i in added}
    for part in (mllm.language_model, mllm.visual.text_model):
        if part is not None:
            extend_embeddings(part, spellings)
    save_release(mllm, processor, folder, torch.float32)
    print(f"{folder}: {len(old)} tokens and {len(added)} new ones")


if __name__ == "__main__":
    one_line_errors()(app)()
