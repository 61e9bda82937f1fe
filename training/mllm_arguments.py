"""Options of the MLLM's training: what it starts from, what is trained, and on which data."""

from dataclasses import dataclass, field, fields

from peft import LoraConfig
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.arguments import check_arguments, checked_number
from training.data import Source
from training.errors import check_keys
from training.mllm_trainer import is_under
from training.model_card import check_metadata
from training.release import FLOAT_TYPES
from unitok_mllm.configuration_unitok import LIBRARY_FIELDS, SHARE, WEIGHT, UniTokDepthConfig
from unitok_mllm.drawing_unitok import UniTokDrawingOptions
from unitok_mllm.interleaved_unitok import IMAGE_OPTIONS
from unitok_mllm.processing_unitok import VICUNA_SYSTEM


PARTS = ["embedder", "depth_head", "language_model"]
# options for an MLLM that is joined from parts
OF_PARTS = (
    *("text_tokenizer", "depth_config", "embedder_dim", "embedder_heads", "system_line", "boi_token", "eoi_token"),
    *("add_image_tokens", "llm_gguf_file"),
)


@dataclass
class MLLMArguments:
    """Options of the MLLM's training besides the Trainer's. Each field's help text explains it."""

    model: str = field(
        default="", metadata={"help": "folder or hub name of an MLLM to start from; instead of the parts below"}
    )
    visual_model: str = field(
        default="", metadata={"help": "folder of a UniTok tokenizer; with model, it replaces the model's own"}
    )
    llm: str = field(default="", metadata={"help": "folder or hub name of a causal LM to start from"})
    llm_config: dict | None = field(
        default=None, metadata={"help": "config of a newly initialised causal LM, instead of llm"}
    )
    llm_gguf_file: str = field(default="", metadata={"help": "GGUF file with the weights, in the folder llm"})
    text_tokenizer: str = field(default="", metadata={"help": "folder of the text tokenizer, if llm has none"})
    llm_dtype: str = field(default="float32", metadata={"help": "dtype to load the LLM in"})
    depth_config: dict | None = field(default=None, metadata={"help": "sizes of the depth transformer"})
    embedder_dim: int = field(default=1024, metadata={"help": "width of the embedder's attention projection"})
    embedder_heads: int = field(default=16, metadata={"help": "attention heads of that projection"})
    system_line: str = field(default=VICUNA_SYSTEM, metadata={"help": "system line of the vicuna_v1 chat template"})
    boi_token: str = field(
        default="", metadata={"help": "token that opens an image; empty for a known one of the text tokenizer"}
    )
    eoi_token: str = field(default="", metadata={"help": "token that closes an image; set both or neither"})
    add_image_tokens: bool = field(
        default=False,
        metadata={"help": "add these tokens if the text tokenizer lacks them, with new rows in the LLM's embeddings"},
    )

    trainable: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "trained parts: embedder, depth_head, language_model, or prefixes of parameter names"},
    )
    train_codebooks: bool = field(default=False, metadata={"help": "also train the embedder's copy of the codebooks"})
    learning_rates: dict | None = field(
        default=None, metadata={"help": "learning rates of single parts, by prefix of parameter names"}
    )
    lora: dict | None = field(
        default=None, metadata={"help": "peft's LoraConfig for the LLM's linear layers, such as {r: 16}"}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: load the LLM in 4 bits (bitsandbytes); needs lora"}
    )

    datasets: list[dict] = field(
        default_factory=list, metadata={"help": "sources of training data (YAML only), see training/data.py"}
    )
    eval_datasets: list[dict] = field(default_factory=list, metadata={"help": "sources for the evaluation loss"})
    num_samples: int = field(
        default=0, metadata={"help": "samples of the whole run; 0 for as many as all sources have"}
    )
    max_length: int = field(
        default=2048, metadata={"help": "length of the longest sample and of a packed row, in tokens"}
    )
    packing: bool = field(
        default=False, metadata={"help": "pack several samples into each row, without attention between them"}
    )
    align_words: bool = field(
        default=False,
        metadata={
            "help": "first stage: teach the embedder the words of captions to read, by a loss that needs the LLM's "
            "token embeddings but not its layers; with trainable: [embedder]"
        },
    )
    caption_dropout: float = field(default=0.1, metadata={"help": "share of captions that the null prompt replaces"})
    max_broken_share: float = field(
        default=0.01, metadata={"help": "share of broken samples above which the run stops"}
    )
    text_loss_weight: float = field(
        default=0.0,
        metadata={"help": "weight of the text loss, the rest is the image loss's; 0 to weigh both by their targets"},
    )
    image_loss_share: float = field(
        default=1.0, metadata={"help": "share of image positions that the image loss is computed on"}
    )

    sample_prompts: list[str] = field(default_factory=list, metadata={"help": "prompts to draw at each evaluation"})
    sample_questions: list[dict] = field(
        default_factory=list, metadata={"help": "{image, question} to answer at each evaluation (YAML only)"}
    )
    sample_options: dict | None = field(
        default=None, metadata={"help": "options of the drawings: guidance_scale, top_k ..."}
    )
    release_dtype: str = field(default="float16", metadata={"help": "dtype of the released weights"})
    card: dict = field(
        default_factory=dict,
        metadata={"help": "front matter of the release's model card: {license: mit, datasets: [owner/name]} ..."},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "attention implementation of the LLM: sdpa or flash_attention_2"}
    )

    def __post_init__(self):
        limits = {"num_samples": (0, 2**40), "max_length": (2, 2**24)}
        limits |= dict.fromkeys(("embedder_dim", "embedder_heads"), (1, 2**20))
        check_arguments(self, **limits, caption_dropout=SHARE, max_broken_share=SHARE, text_loss_weight=SHARE)
        self._check_keys()
        if not self.trainable:
            raise ValueError(f"trainable names nothing to train; the parts are {', '.join(PARTS)}.")
        if joined := [name for name in self.trainable if "," in name]:
            raise ValueError(f"Separate the names in trainable by spaces on the command line, got {joined[0]!r}.")
        for option in ("trainable", "learning_rates"):
            check_keys(option, [name.partition(".")[0] for name in getattr(self, option)], PARTS)
        if not self.model and not (self.visual_model and (self.llm or self.llm_config)):
            raise ValueError("Give either model, or visual_model with llm or llm_config.")
        if self.load_in_4bit and not self.lora:
            raise ValueError("load_in_4bit needs lora: 4-bit weights cannot be trained.")
        if self.load_in_4bit and (not self.model or self.visual_model):
            raise ValueError("load_in_4bit needs `model` alone: the folder of a whole MLLM.")
        if self.lora and "language_model" in self.trainable:
            raise ValueError("lora freezes the LLM's own weights: take language_model out of trainable.")
        if self.align_words and (self.lora or {name.partition(".")[0] for name in self.trainable} != {"embedder"}):
            raise ValueError("align_words trains the embedder alone: set trainable: [embedder], without lora.")
        for source in (*self.datasets, *self.eval_datasets) if self.align_words else ():
            if source.get("type") != "captions" or source.get("task", "read") != "read":
                raise ValueError(f"align_words takes captions to read (type: captions, task: read), got {source}.")
        if self.lora and "modules_to_save" in self.lora:
            raise ValueError("lora takes no modules_to_save: use trainable for the parts to train in full.")
        if "/" not in self.attn_implementation:  # a slash names a kernel on the hub
            check_keys("attn_implementation", [self.attn_implementation], ["eager", *ALL_ATTENTION_FUNCTIONS])
        for name in ("llm_dtype", "release_dtype"):
            if getattr(self, name) not in FLOAT_TYPES:
                raise ValueError(f"{name} must be one of {', '.join(FLOAT_TYPES)}, got {getattr(self, name)!r}.")
        if not 0 < self.image_loss_share <= 1:
            raise ValueError(f"image_loss_share must be above 0 and at most 1, got {self.image_loss_share}.")
        if self.train_codebooks and not any(is_under("embedder.quantizer.codebooks", p) for p in self.trainable):
            raise ValueError("train_codebooks needs embedder or embedder.quantizer in trainable.")
        without_use = {
            "model": (self.model, ("llm", "llm_config", *OF_PARTS)),
            "llm": (self.llm, ("llm_config",)),
            "no llm": (not self.llm, ("llm_gguf_file",)),
            "no sample_prompts": (not self.sample_prompts, ("sample_options",)),
        }
        defaults = {option.name: option.default for option in fields(self)}
        for what, (is_given, names) in without_use.items():
            for name in names:
                if is_given and getattr(self, name) != defaults[name]:
                    raise ValueError(f"With {what}, {name} {getattr(self, name)!r} would have no effect.")
        if bool(self.boi_token) != bool(self.eoi_token):
            raise ValueError(
                f"Set both boi_token and eoi_token, or neither, got {self.boi_token!r} and {self.eoi_token!r}."
            )

    def _check_keys(self) -> None:
        """Check the names and values in nested fields.

        Raises:
            ValueError: a name is unknown, or a value is impossible.
        """
        check_metadata(self.card)
        names = [option.name for option in fields(LoraConfig)]
        check_keys("lora", self.lora or {}, names)
        for name in {"lora_alpha", "lora_dropout"} & (self.lora or {}).keys():
            limits = SHARE if name == "lora_dropout" else WEIGHT
            self.lora[name] = checked_number(f"{name} of lora", self.lora[name], *limits)
        rank = (self.lora or {}).get("r", 1)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r of lora must be an integer of at least 1, got {rank!r}.")
        rates = self.learning_rates or {}
        self.learning_rates = {
            name: checked_number(f"learning_rates of {name}", rates[name], *WEIGHT) for name in rates
        }
        check_keys("depth_config", self.depth_config or {}, UniTokDepthConfig.own_fields())
        UniTokDepthConfig(**self.depth_config or {})
        if self.embedder_dim % self.embedder_heads:
            raise ValueError(
                f"embedder_dim ({self.embedder_dim}) is not a multiple of embedder_heads ({self.embedder_heads})."
            )
        for source in (*self.datasets, *self.eval_datasets):
            check_keys(
                f"the data set {source.get('path', source)}", source, [option.name for option in fields(Source)]
            )
            if "path" not in source:
                raise ValueError(f"A data set has no path: {source}.")
        for question in self.sample_questions:
            check_keys("a sample question", question, ("image", "question"))
            if len(question) < 2 or not all(isinstance(text, str) for text in question.values()):
                raise ValueError(f"A sample question must have an image and a question, both texts, got {question}.")
        known = IMAGE_OPTIONS & {option.name for option in fields(UniTokDrawingOptions)}
        check_keys("sample_options", self.sample_options or {}, sorted(known))
        UniTokDrawingOptions(**self.sample_options or {})
        if self.llm_config:
            model_type = self.llm_config.get("model_type")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(f"llm_config needs a model_type that transformers knows, got {model_type!r}.")
            config_class = CONFIG_MAPPING[model_type]
            known = {option.name for option in fields(config_class)} | config_class.attribute_map.keys()
            check_keys("llm_config", self.llm_config, sorted(known | LIBRARY_FIELDS | {"rope_theta", "rope_scaling"}))
