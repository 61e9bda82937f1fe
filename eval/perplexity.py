"""Measure the perplexity of texts, to see whether an LLM that learned pictures still writes as well as before.

python -m eval.perplexity --model runs/smollm2-lora/release --texts runs/data/python-docs/test_texts.jsonl

Compare with the same command on the model before the training: with LoRA `<output_dir>/base`.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval._common import check_kind, load_model, parse_settings, versions
from eval.protocol import number
from training.data import IGNORE
from training.errors import one_line_errors
from training.files import folder_digest, read_rows, write_atomically
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.configuration_unitok import check_ranges
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.outputs import check_output_file


@dataclass
class Settings:
    """Command-line options.

    Raises:
        ValueError: a value is out of its range, a file cannot be read, or the folder holds no MLLM.
    """

    model: str = field(metadata={"help": "folder of model and processor"})
    texts: str = field(metadata={"help": 'file of texts, .jsonl, .json or .parquet: {"text": ...} a row'})
    output: str = field(default="runs/perplexity.json", metadata={"help": "JSON file for the results"})
    max_length: int = field(default=1024, metadata={"help": "tokens per chunk; longer texts are cut into several"})
    batch_size: int = field(default=8, metadata={"help": "chunks per batch"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})

    def __post_init__(self):
        check_ranges(self, max_length=(2, 2**24), batch_size=(1, 2**20))
        find_device(self.device)
        check_output_file(self.output)
        check_kind(self.model, "unitok_mllm")
        rows = read_rows(Path(self.texts))
        self.contents = [row.get("text") for row in rows]
        if not self.contents or not all(isinstance(text, str) for text in self.contents):
            raise ValueError(f'each row of {self.texts} must have a text, {{"text": ...}}, and there must be some')


@torch.no_grad()
def perplexity(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    texts: list[str],
    max_length: int = 1024,
    batch_size: int = 8,
) -> dict[str, float | int]:
    """Compute the perplexity of texts, each with the token that ends it.

    A text longer than `max_length` tokens is cut into chunks without overlap, each read without those before it.

    Args:
        model: the MLLM.
        processor: its processor.
        texts: the texts. Special tokens spelled in them are plain text.
        max_length: tokens per chunk, at least 2.
        batch_size: chunks per batch, of similar length.

    Returns:
        `perplexity`, exp of the mean negative log-likelihood over all predicted `tokens`: all but the first of each
        chunk.

    Raises:
        ValueError: there is nothing to predict.
    """
    end = processor.tokenizer.eos_token
    ids = [torch.tensor(processor.encode_text(processor.mark_plain(text) + end)[0]) for text in texts]
    chunks = [chunk for row in ids for chunk in row.split(max_length) if len(chunk) > 1]
    if not chunks:
        raise ValueError("There is no text to predict.")
    chunks.sort(key=len)
    total, tokens = 0.0, 0
    for start in tqdm(range(0, len(chunks), batch_size), desc="reading texts"):
        batch = chunks[start : start + batch_size]
        input_ids = pad_sequence(batch, batch_first=True, padding_value=processor.tokenizer.pad_token_id)
        attention_mask = pad_sequence([torch.ones_like(chunk) for chunk in batch], batch_first=True)
        labels = input_ids.masked_fill(attention_mask == 0, IGNORE)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        total += output.text_loss.item() * int(output.num_text_targets)
        tokens += int(output.num_text_targets)
    return {"perplexity": math.exp(total / tokens), "tokens": tokens, "texts": len(texts)}


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, __doc__)
    model, processor = load_model(settings.model, settings.device)
    result = perplexity(model, processor, settings.contents, settings.max_length, settings.batch_size)
    print(f"perplexity {result['perplexity']:.3f} over {result['tokens']} tokens of {result['texts']} texts")
    protocol = {
        "split": f"{Path(settings.texts).name}, {len(settings.contents)} texts",
        "images": "none",
        "tool": f"chunks of {settings.max_length} tokens, all but the first of each, without overlap",
    }
    result["numbers"] = [number("texts", "perplexity", result["perplexity"], **protocol)]
    result |= {"settings": asdict(settings), "model_sha256": folder_digest(settings.model), "versions": versions()}
    write_atomically(settings.output, json.dumps(result, indent=2).encode())


if __name__ == "__main__":
    main()
