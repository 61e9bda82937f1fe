"""VQAScore (https://arxiv.org/abs/2404.01291) of pictures, by the authors' package t2v-metrics.

    PYTHON_OF_T2V_METRICS -m eval.vqa_score pairs.json scores.json --model clip-flant5-xxl

`pairs.json` is a list of [picture's path, text]; `scores.json` becomes the list of their scores in [0, 1]. The package
pins torch 2.5 and transformers 4.49, so it needs an environment of its own. This file needs nothing but the package.
`eval.text_to_image --vqa_python` runs it there.
"""

import argparse
import json
from pathlib import Path


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that prints errors in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="JSON file of [picture's path, text] pairs")
    parser.add_argument("scores", type=Path, help="where the scores go")
    parser.add_argument("--model", default="clip-flant5-xxl", help="the package's name of it (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--batch_size", "--batch-size", type=int, default=16, help="pairs at a time (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if not arguments.pairs.is_file():
        parser.error(f"there is no file {arguments.pairs}")
    if arguments.batch_size < 1:
        parser.error(f"batch_size must be at least 1, got {arguments.batch_size}")
    if arguments.scores.is_dir() or not arguments.scores.absolute().parent.is_dir():
        parser.error(f"cannot write {arguments.scores}: it is a folder, or in no folder")
    import t2v_metrics
    import torch

    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = t2v_metrics.get_score_model(model=arguments.model, device=arguments.device)
    rows = [
        {"images": [picture], "texts": [text]}
        for picture, text in json.loads(arguments.pairs.read_text(encoding="utf-8"))
    ]
    scores = scorer.batch_forward(dataset=rows, batch_size=arguments.batch_size)  # (N, 1, 1)
    arguments.scores.write_text(json.dumps(scores.flatten().tolist()), encoding="utf-8")


if __name__ == "__main__":
    main()
