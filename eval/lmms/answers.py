"""Answers, written to disk as soon as they are given, so that an interrupted evaluation resumes."""

import json
from pathlib import Path


class AnswerLog:
    """Answers by key; with a path, each process appends its own to `PATH.RANK.jsonl` and reads those of all.

    Args:
        path: None to keep the answers in memory alone.
        rank: of this process.
    """

    def __init__(self, path: str | Path | None = None, rank: int = 0):
        self.answers = {}
        self.path = None if path is None else Path(f"{path}.{rank}.jsonl")
        if path is not None:
            for file in sorted(Path(path).parent.glob(f"{Path(path).name}.*.jsonl")):
                for line in file.read_text(encoding="utf-8").splitlines():
                    self._read(line)

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that was being written when its process was killed
            return
        self.answers[row["key"]] = row["answer"]

    def add(self, rows: list[dict]) -> None:
        """Add rows with a "key", an "answer", and further fields for readers."""
        self.answers.update({row["key"]: row["answer"] for row in rows})
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"\n{json.dumps(row)}" for row in rows)
