"""Runs of `eval.claims`: options, settings of each training, and their order."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from training.extract_codes import file_digest
from training.losses import RECONSTRUCTION_TERMS, LossArguments
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.train_tokenizer import TokenizerArguments
from unitok_mllm import UniTokConfig


JOINT, RECONSTRUCTION, CAPTIONS = "joint", "reconstruction", "captions"
WEIGHTS = {  # changes of the config for each kind of supervision
    JOINT: {},
    RECONSTRUCTION: {"contrastive_weight": 0.0},
    CAPTIONS: {f"{name}_weight": 0.0 for name in RECONSTRUCTION_TERMS},
}
SET_HERE = ("max_steps", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "resume")
WITHOUT_EFFECT = (
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "dataloader_num_workers",
)


@dataclass
class ClaimsArguments:
    """Options of the comparison: what is trained, and for how long."""

    steps: int = field(default=900, metadata={"help": "optimizer steps of each run of the comparison"})
    search_steps: int = field(default=300, metadata={"help": "optimizer steps of each run of the search"})
    batch_size: int = field(default=48, metadata={"help": "images per step, over all processes"})
    total_codes: int = field(default=4096, metadata={"help": "total number of codes in all sub-codebooks"})
    codebooks: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "numbers of sub-codebooks"})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the comparison, one run for each"}
    )
    search_seed: int = field(default=100, metadata={"help": "seed of the search"})
    candidates: dict = field(
        default_factory=dict,
        metadata={"help": "settings to try for each K, by name, each a dict of options to change (YAML only)"},
    )
    validation: dict = field(
        default_factory=dict,
        metadata={"help": "as held_out, for the choice of settings and for the curves (YAML only)"},
    )
    held_out: dict = field(
        default_factory=dict, metadata={"help": "files or folders of captioned images by name (YAML only)"}
    )
    limit: int = field(
        default=0, metadata={"help": "number of images of each held-out set, the first ones; 0 for all"}
    )
    processes: int = field(default=1, metadata={"help": "processes per training, on this machine"})

    def __post_init__(self):
        for name in ("steps", "search_steps", "batch_size", "total_codes", "processes"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}.")
        for name in ("codebooks", "seeds", "candidates", "validation", "held_out"):
            if not vars(self)[name]:
                raise ValueError(f"{name} must not be empty.")
        if min(self.limit, self.search_seed, *self.seeds) < 0:
            raise ValueError(
                f"limit and seeds must be at least 0, got {self.limit}, {self.search_seed} and {self.seeds}."
            )
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size ({self.batch_size}) is not a multiple of {self.processes} processes.")
        for k in self.codebooks:
            if k < 1 or self.total_codes % k:
                raise ValueError(f"total_codes ({self.total_codes}) is not a multiple of {k} sub-codebooks.")
        for kind in ("validation", "held_out"):
            for name, path in vars(self)[kind].items():
                if not Path(path).exists():
                    raise ValueError(f"The {kind} set {name!r} is not there: {path}.")


@dataclass
class Run:
    """One tokenizer to be trained.

    Attributes:
        stage: "search" or "comparison".
        num_codebooks: K, the number of sub-codebooks.
        codebook_size: V, the number of codes in each. K * V is the total.
        supervision: "joint", "reconstruction" or "captions".
        candidate: name of the candidate setting.
        seed: seed of the training.
        settings: everything the result depends on. `training` is the config of `training.train_tokenizer`, without the
            options that differ between machines (see `train`).
    """

    stage: str
    num_codebooks: int
    codebook_size: int
    supervision: str
    candidate: str
    seed: int
    settings: dict

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{self.stage}-k{self.num_codebooks}-{self.supervision}-seed{self.seed}-{digest[:10]}"

    @property
    def bits(self) -> float:
        """Capacity of one image position in bits: log2 of the V^K combinations of codes."""
        return self.num_codebooks * math.log2(self.codebook_size)


def digest_of_files(paths: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each path that is a file."""
    return {path: file_digest([Path(path)]) for path in paths if Path(path).is_file()}


def check_geometry(preset: str, text_overrides: dict, vision_overrides: dict) -> None:
    """Check before any training that the sizes fit.

    Raises:
        ValueError: they do not.
    """
    try:
        UniTokConfig.preset(preset, text_overrides, **vision_overrides)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


class Plan:
    """The runs of a comparison.

    Raises:
        ValueError: the config sets an option that each run sets itself, a source is not a folder, a candidate has an
            unknown option, or a geometry is impossible.
    """

    def __init__(
        self,
        claims: ClaimsArguments,
        tokenizer: TokenizerArguments,
        losses: LossArguments,
        training: TokenizerTrainingArguments,
    ):
        defaults = {f.name: f.default for f in fields(TokenizerTrainingArguments)}
        if given := [name for name in SET_HERE if vars(training)[name] != defaults[name]]:
            raise ValueError(f"Set steps, seeds and batch_size instead of {', '.join(given)}.")
        if tokenizer.init_from or tokenizer.init_open_clip:
            raise ValueError("Every run starts from new weights: leave out init_from and init_open_clip.")
        if kinds := sorted({source.get("kind", "") for source in tokenizer.datasets} - {"folder"}):
            raise ValueError(f"The datasets must be of kind folder, got {', '.join(kinds)}.")
        if tokenizer.eval_datasets:
            raise ValueError("Give the validation sets in validation, not in eval_datasets.")
        apart = (*SET_HERE, *WITHOUT_EFFECT, "output_dir")
        self.claims, self.tokenizer = claims, tokenizer
        self.common = {
            name: value
            for part in (tokenizer, losses, training)
            for name, value in asdict(part).items()
            if name not in apart
        }
        self.common["eval_datasets"] = [
            {"kind": "folder", "path": path, "in_memory": True} for path in claims.validation.values()
        ]
        for name, options in claims.candidates.items():
            if not isinstance(options, dict):
                raise ValueError(f"The candidate {name!r} must be a mapping of options to values, got {options!r}.")
            if unknown := sorted(options.keys() - self.common.keys()):
                raise ValueError(f"The candidate {name!r} sets unknown options: {', '.join(unknown)}.")
        for k in claims.codebooks:
            check_geometry(tokenizer.preset, tokenizer.text_overrides, self._vision_overrides(k))
        paths = [source["path"] for source in tokenizer.datasets if "path" in source]
        paths += [*claims.validation.values(), *claims.held_out.values(), f"{tokenizer.text_tokenizer}/tokenizer.json"]
        self.beside = {
            "limit": claims.limit,
            "batch_size": claims.batch_size,
            "files_sha256": digest_of_files(paths),
        }

    def _vision_overrides(self, k: int) -> dict:
        codes = {"num_codebooks": k, "codebook_size": self.claims.total_codes // k}
        return self.tokenizer.vision_overrides | codes

    def _run(self, stage: str, k: int, supervision: str, candidate: str, seed: int) -> Run:
        claims = self.claims
        config = self.common | claims.candidates[candidate] | WEIGHTS[supervision]
        config |= {"vision_overrides": self._vision_overrides(k), "seed": seed}
        config["max_steps"] = claims.search_steps if stage == "search" else claims.steps
        measured = claims.validation if stage == "search" else claims.held_out
        settings = {"training": config, "measured": measured, **self.beside}
        return Run(stage, k, claims.total_codes // k, supervision, candidate, seed, settings)

    def search(self) -> list[Run]:
        """Return a run for every candidate and K; empty if there is only one candidate."""
        claims = self.claims
        if len(claims.candidates) == 1:
            return []
        return [
            self._run("search", k, JOINT, candidate, claims.search_seed)
            for candidate in claims.candidates
            for k in dict.fromkeys(claims.codebooks)
        ]

    def comparison(self, choice: dict[int, str]) -> list[Run]:
        """Return all runs with the chosen candidate of each K, seed by seed: the first seed already compares all K."""
        claims = self.claims
        return [
            self._run("comparison", k, supervision, choice[k], seed)
            for seed in dict.fromkeys(claims.seeds)
            for k in dict.fromkeys(claims.codebooks)
            for supervision in (WEIGHTS if k == max(claims.codebooks) else (JOINT,))
        ]
