"""Makes the small byte-level BPE tokenizer of the `tiny` models from easy-VQA's train split.

python -m training.text_tokenizer runs/tiny-text-tokenizer
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training import easy_vqa
from unitok_mllm.processing_unitok import GENERATION_SUFFIX, UNCONDITIONAL_PROMPT


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<boi>", "<eoi>", "<image>")
TURNS = "USER: ASSISTANT: "


def train_text_tokenizer(texts: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that any text can be written, with a BOS in front like Llama's."""
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where it is written to")
    folder = parser.parse_args(argv).folder
    if folder.is_file():
        parser.error(f"{folder} is a file, not a folder")
    samples = easy_vqa.load("train")
    texts = [s.caption + GENERATION_SUFFIX for s in samples] + [UNCONDITIONAL_PROMPT] * 400
    texts += [f"{TURNS}{question} {answer}" for s in samples for question, answer in s.questions]
    train_text_tokenizer(texts).save_pretrained(folder)


if __name__ == "__main__":
    main()
