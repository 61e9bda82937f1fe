"""Train a small byte-level BPE tokenizer, on your own captions and conversations or on easy-VQA's texts.

python -m training.text_tokenizer runs/tiny-text-tokenizer
python -m training.text_tokenizer runs/my-text-tokenizer --captions data/captions.jsonl --vocab-size 4096
"""

import argparse
import itertools
import os
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training import easy_vqa
from training.errors import CommandLine, one_line_errors
from training.files import read_rows
from unitok_mllm.outputs import check_output_folder
from unitok_mllm.processing_unitok import GENERATION_SUFFIX, UNCONDITIONAL_PROMPT


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<boi>", "<eoi>", "<image>")
ROLES = ("USER", "ASSISTANT")
TURNS = "USER: ASSISTANT: "
IMAGE = "<image>"
SMALLEST = len(SPECIAL_TOKENS) + 256  # one token per byte
LARGEST = 2**20  # the trainer allocates memory for all tokens


def train_text_tokenizer(texts: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text and, like Llama's, prepends a BOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    )


def easy_vqa_texts() -> list[str]:
    """Return the texts that the shipped model is trained on: prompts, null prompts, questions with their answers."""
    samples = easy_vqa.load("train")
    texts = [s.caption + GENERATION_SUFFIX for s in samples] + [UNCONDITIONAL_PROMPT] * 400
    return texts + [f"{TURNS}{question} {answer}" for s in samples for question, answer in s.questions]


def read_captions(path: str | os.PathLike) -> list[str]:
    """Read the captions of a table.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: the table has no rows, or a row without a caption; the message names it.
    """
    rows = read_rows(path)
    if not len(rows):
        raise ValueError(f"{path} has no rows.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("caption"), str):
            raise ValueError(f"Row {number} of {path} has no text under 'caption'.")
    return [row["caption"] for row in rows]


def conversation_texts(paths: list[str | os.PathLike]) -> list[str]:
    """Return the texts of conversations in LLaVA's format, in the chat template's words and without image placeholders.

    Raises:
        FileNotFoundError: a table does not exist.
        ValueError: a table has no rows, or a row without turns; the message names it.
    """
    texts = []
    for path in paths:
        rows = read_rows(path)
        if not len(rows):
            raise ValueError(f"{path} has no rows.")
        for number, row in enumerate(rows, start=1):
            try:
                turns = [turn["value"].replace(IMAGE, "").strip() for turn in row["conversations"]]
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"Row {number} of {path} has no turns with a text under 'value'.") from error
            texts.append(" ".join(f"{role}: {turn}" for role, turn in zip(itertools.cycle(ROLES), turns)))
    return texts


def caption_texts(paths: list[str | os.PathLike]) -> list[str]:
    """Return the captions of tables as prompts; for every ten also a null prompt and the chat template's words.

    Raises:
        FileNotFoundError: see `read_captions`.
        ValueError: see `read_captions`.
    """
    prompts = [caption + GENERATION_SUFFIX for path in paths for caption in read_captions(path)]
    return prompts + [UNCONDITIONAL_PROMPT, TURNS] * (len(prompts) // 10 + 1)


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write the tokenizer to")
    parser.add_argument(
        "--captions",
        type=Path,
        action="append",
        help="a .jsonl, .json or .parquet file with a `caption` in each row; repeat for several; default: easy-VQA",
    )
    parser.add_argument(
        "--conversations",
        type=Path,
        action="append",
        help="a .json, .jsonl or .parquet file of conversations in LLaVA's format; repeat for several",
    )
    parser.add_argument("--vocab_size", type=int, default=512, help="largest vocabulary (default: 512)")
    arguments = parser.parse_args(argv)
    check_output_folder(arguments.folder)
    if arguments.vocab_size < SMALLEST:
        parser.error(f"--vocab-size {arguments.vocab_size} is below {SMALLEST}, the special tokens and all bytes")
    if arguments.vocab_size > LARGEST:
        parser.error(f"--vocab-size {arguments.vocab_size} is above {LARGEST}")
    texts = caption_texts(arguments.captions or []) + conversation_texts(arguments.conversations or [])
    if not arguments.captions and not arguments.conversations:
        texts = easy_vqa_texts()
    tokenizer = train_text_tokenizer(texts, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
