"""VQAScore (https://arxiv.org/abs/2404.01291) of pictures, by the authors' package t2v-metrics.

    PYTHON_OF_T2V_METRICS -m eval.vqa_score pairs.json scores.json --model clip-flant5-xxl

`pairs.json` is a list of [picture's path, text]; `scores.json` becomes the list of their scores in [0, 1]. The package
pins torch 2.5 and transformers 4.49 and so has an environment of its own: this file needs nothing but the package.
`eval.text_to_image --vqa_python` runs it there.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--model", default="clip-flant5-xxl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch_size", type=int, default=16)
    arguments = parser.parse_args()
    import t2v_metrics

    scorer = t2v_metrics.get_score_model(model=arguments.model, device=arguments.device)
    rows = [
        {"images": [picture], "texts": [text]}
        for picture, text in json.loads(arguments.pairs.read_text(encoding="utf-8"))
    ]
    scores = scorer.batch_forward(dataset=rows, batch_size=arguments.batch_size)  # (N, 1, 1)
    arguments.scores.write_text(json.dumps(scores.flatten().tolist()), encoding="utf-8")


if __name__ == "__main__":
    main()
