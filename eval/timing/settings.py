"""The options of `eval.speed`, with its presets and their jobs."""

from dataclasses import dataclass, field

from transformers import AutoConfig

from unitok_mllm import UniTokConfig
from unitok_mllm.devices import AUTO, DEVICE_HELP, find_device
from unitok_mllm.inference import SHIPPED_MODEL, check_model
from unitok_mllm.outputs import check_output_file


DTYPES = ("float32", "bfloat16")

TOKENIZER_JOBS = ("encode", "decode", "train_tokenizer")

MLLM_JOBS = ("draw", "draw_sampled", "answer", "train_mllm")

PRESETS = {
    "tiny": (*TOKENIZER_JOBS, *MLLM_JOBS, "first_answer", "load", "import"),
    "smollm2": (*MLLM_JOBS, "load", "import"),
    "large": (*TOKENIZER_JOBS, "load", "import"),
    "7b": (*TOKENIZER_JOBS, *MLLM_JOBS, "load", "import"),
}

PEERS = {"janus": (384, 576), "emu3": (512, 64 * 65)}  # sides of their images in pixels, and the tokens of an image


@dataclass
class Settings:
    """Command-line options.

    Raises:
        ValueError: a preset, dtype, device or job is unknown; the model lacks the part for a job; a folder has no
            model; or a number is out of its range.
    """

    preset: str = field(default="tiny", metadata={"help": f"one of {', '.join(PRESETS)}"})
    model: str = field(default="", metadata={"help": "folder of an MLLM or a tokenizer, instead of a preset"})
    dtype: str = field(default="float32", metadata={"help": f"one of {', '.join(DTYPES)}"})
    device: str = field(default=AUTO, metadata={"help": DEVICE_HELP})
    jobs: list[str] = field(
        default_factory=list, metadata={"help": "names of jobs; default: all that the model has parts for"}
    )
    peer: list[str] = field(
        default_factory=list,
        metadata={"help": f"also draw with the library's models of the LLM's size: {', '.join(PEERS)}"},
    )
    batches: list[int] = field(
        default_factory=lambda: [1, 4, 16], metadata={"help": "batch sizes: images, prompts or questions at once"}
    )
    train_batches: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "batch sizes of the training steps"}
    )
    runs: int = field(default=5, metadata={"help": "number of runs, of which the median is reported"})
    seconds: float = field(default=60.0, metadata={"help": "time limit of a row: no further run begins after it"})
    positions: int = field(default=0, metadata={"help": "image positions to draw; 0: all"})
    threads: int = field(default=0, metadata={"help": "number of CPU threads; 0: torch's choice"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the decoder, and the model that is trained"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in training, which takes less memory"}
    )
    naive: bool = field(default=False, metadata={"help": "also time the naive implementation, for comparison"})
    output: str = field(default="", metadata={"help": "JSON file for settings, versions and rows"})

    def __post_init__(self):
        for name, choices in (("preset", PRESETS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self.device = str(find_device(self.device))
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device is cpu or cuda, got {self.device!r}")
        possible = PRESETS[self.preset]
        if self.model:
            check_model(self.model)
            is_tokenizer = isinstance(AutoConfig.from_pretrained(self.model), UniTokConfig)
            possible = PRESETS["large" if is_tokenizer else "tiny"]
        if unknown := sorted(set(self.jobs) - set(possible)):
            raise ValueError(f"no job {', '.join(unknown)} for {self.name}: its jobs are {', '.join(possible)}")
        self.jobs = self.jobs or list(possible)
        if unknown := sorted(set(self.peer) - set(PEERS)):
            raise ValueError(f"no peer {', '.join(unknown)}: the peers are {', '.join(PEERS)}")
        if self.peer and (self.model or self.preset not in ("smollm2", "7b")):
            raise ValueError(f"peers have the LLM's size of the presets smollm2 and 7b, got {self.name}")
        self.jobs += [f"draw_{name}" for name in self.peer]
        for name in ("batches", "train_batches", "runs"):
            value = getattr(self, name)
            if min(value if isinstance(value, list) else [value], default=0) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min(self.seconds, self.positions, self.threads) < 0:
            raise ValueError("seconds, positions and threads must be at least 0")
        if self.output:
            check_output_file(self.output)

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model or self.preset

    @property
    def folder(self) -> str:
        """Folder to load the model from; empty for random weights."""
        return self.model or (str(SHIPPED_MODEL) if self.preset == "tiny" else "")
