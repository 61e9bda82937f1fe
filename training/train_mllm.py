"""Train the unified MLLM, in any of its stages. The config sets the trained parts, the data and the learning rates.

    python -m training.train_mllm training/configs/mllm_tiny.yaml
    torchrun --nproc_per_node 2 -m training.train_mllm training/configs/mllm_tiny.yaml \\
        --deepspeed training/configs/deepspeed/zero2.json

The same command resumes from the newest complete checkpoint in `output_dir`. The folder `<output_dir>/release` is what
`AutoModelForImageTextToText` and `AutoProcessor` load; with LoRA, `<output_dir>/adapter` holds the adapter alone.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
)
from transformers.core_model_loading import PrefixChange
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.trainer import TRAINER_STATE_NAME

from training.arguments import BELOW_ONE, check_datasets, check_source, parse_yaml_and_command_line
from training.checkpoints import check_files, newest_checkpoint
from training.codes import CodeStore
from training.data import MLLMCollator, MLLMDataset, SampleTexts, Source
from training.errors import one_line_errors
from training.files import MOST_WORKERS, how_to_go_on, log_broken, whole_checkpoints
from training.merge_lora import load_with_adapter
from training.mllm_arguments import MLLMArguments
from training.mllm_trainer import (
    WHOLE,
    ExpectedTimeCallback,
    MLLMTrainer,
    SamplesCallback,
    is_under,
    plain_name,
    put_visual_back,
    set_visual_aside,
)
from training.model_card import TrainingRun, push_release, training_facts
from training.release import check_weight, save_release, write_folder
from training.run_folder import claim_folder
from training.trainer_options import check_trainer_options
from unitok_mllm import (
    UniTokConfig,
    UniTokImageProcessor,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokMLLMProcessor,
    UniTokModel,
)
from unitok_mllm.configuration_unitok import ABOVE_ZERO, SHARE, WEIGHT, UniTokVisionConfig, check_ranges
from unitok_mllm.drawing_unitok import IMAGE_GENERATION
from unitok_mllm.image_processing_unitok import load_image
from unitok_mllm.processing_unitok import vicuna_chat_template


logger = logging.getLogger(__name__)
# Tokens that open and close an image: this project's, Gemma 3's, Qwen's, and Llama's (bytes that no text contains).
IMAGE_TOKENS = (
    ("<boi>", "<eoi>"),
    ("<start_of_image>", "<end_of_image>"),
    ("<|vision_start|>", "<|vision_end|>"),
    ("<0x00>", "<0x01>"),
)


@contextmanager
def whole_weights(training_arguments: TrainingArguments) -> Iterator[None]:
    """Context manager in which models load unsharded, even with ZeRO-3."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training_arguments.deepspeed:
            set_hf_deepspeed_config(training_arguments.hf_deepspeed_config)


def choose_image_tokens(arguments: MLLMArguments, text_tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Choose the tokens that open and close an image: those in the arguments, or a known pair.

    With `add_image_tokens`, missing tokens are added to the text tokenizer.

    Raises:
        ValueError: the text tokenizer lacks the tokens, and they may not be added.
    """
    vocabulary = text_tokenizer.get_vocab()
    known = next((pair for pair in IMAGE_TOKENS if vocabulary.keys() >= set(pair)), IMAGE_TOKENS[0])
    pair = (arguments.boi_token, arguments.eoi_token) if arguments.boi_token else known
    if missing := [token for token in pair if token not in vocabulary]:
        if not arguments.add_image_tokens:
            raise ValueError(
                f"The text tokenizer has no {' and no '.join(missing)} to open and close an image: set "
                "add_image_tokens, or name two of its tokens as boi_token and eoi_token."
            )
        text_tokenizer.add_tokens(missing, special_tokens=True)
    return pair


def build_processor(arguments: MLLMArguments) -> UniTokMLLMProcessor:
    """Load the processor of the initial model, or build one from the LLM's text tokenizer."""
    if arguments.model:
        return UniTokMLLMProcessor.from_pretrained(arguments.model)
    gguf = {"gguf_file": arguments.llm_gguf_file} if arguments.llm_gguf_file and not arguments.text_tokenizer else {}
    text_tokenizer = AutoTokenizer.from_pretrained(arguments.text_tokenizer or arguments.llm, **gguf)
    boi_token, eoi_token = choose_image_tokens(arguments, text_tokenizer)
    image_size = UniTokConfig.from_pretrained(arguments.visual_model).vision_config.image_size
    return UniTokMLLMProcessor(
        UniTokImageProcessor(size={"height": image_size, "width": image_size}),
        text_tokenizer,
        chat_template=vicuna_chat_template(arguments.system_line),
        boi_token=boi_token,
        eoi_token=eoi_token,
    )


def loading_options(arguments: MLLMArguments) -> dict:
    """Return arguments for `from_pretrained` and `from_config` of the LLM."""
    options = {"dtype": getattr(torch, arguments.llm_dtype), "attn_implementation": arguments.attn_implementation}
    if arguments.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "visual", "embedder", "depth_head"],
        )
    return options


def build_language_model(arguments: MLLMArguments) -> PreTrainedModel:
    """Load the LLM, or initialise one from `llm_config`."""
    if not arguments.llm:
        config = AutoConfig.for_model(**arguments.llm_config)
        return AutoModelForCausalLM.from_config(config, **loading_options(arguments))
    if not arguments.llm_gguf_file:
        return AutoModelForCausalLM.from_pretrained(arguments.llm, **loading_options(arguments))
    language_model = AutoModelForCausalLM.from_pretrained(
        arguments.llm, gguf_file=arguments.llm_gguf_file, **loading_options(arguments)
    )
    del language_model.config.quantization_config  # the weights were dequantized, and are saved like that
    return language_model


def build_model(
    arguments: MLLMArguments, training_arguments: TrainingArguments, processor: UniTokMLLMProcessor
) -> UniTokMLLMForConditionalGeneration:
    """Build the initial model for the processor of `build_processor`.

    Its visual tokenizer is unsharded and set aside, see `set_visual_aside`.
    """
    with whole_weights(training_arguments):
        visual = UniTokModel.from_pretrained(arguments.visual_model or arguments.model).eval()
        if arguments.model:  # placeholder for the folder's own tokenizer, which ZeRO-3 would shard; replaced below
            own_visual = UniTokModel(UniTokMLLMConfig.from_pretrained(arguments.model).visual_config)
    if arguments.model:
        model = UniTokMLLMForConditionalGeneration.from_pretrained(
            arguments.model, visual=own_visual, **loading_options(arguments)
        )
        # ZeRO-3's loader records prefix changes that it did not make, and saving would undo them
        model._weight_conversions = [c for c in model._weight_conversions if not isinstance(c, PrefixChange)]
        model.visual = visual.requires_grad_(False)
        model.config.visual_config = visual.config
        for name, ids in processor.config_prompt_ids().items():
            setattr(model.config, name, ids)
        if arguments.visual_model:
            model.embedder.quantizer.load_state_dict(visual.vision_model.quantizer.state_dict())
    else:
        language_model = build_language_model(arguments)
        tokens = max(processor.boi_token_id, processor.eoi_token_id) + 1
        if arguments.add_image_tokens and tokens > language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(tokens)
        model = UniTokMLLMForConditionalGeneration.from_parts(
            language_model,
            visual,
            depth_config=arguments.depth_config,
            embedder_dim=arguments.embedder_dim,
            embedder_heads=arguments.embedder_heads,
            image_generation=IMAGE_GENERATION,
            **processor.config_token_ids(),
        )
    if arguments.train_codebooks:
        model.embedder.unfreeze_codebooks()
    set_visual_aside(model)
    return model


def check_numbers(training_arguments: TrainingArguments) -> None:
    """Check numbers that the `Trainer` does not check.

    Raises:
        ValueError: a number is NaN, infinite, negative or too large.
    """
    ranges = dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), WEIGHT)
    ranges |= {"adam_beta1": BELOW_ONE, "adam_beta2": BELOW_ONE, "adam_epsilon": SHARE}
    ranges |= dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "save_total_limit"), ABOVE_ZERO)
    ranges |= {"seed": (0, 2**32 - 1), "data_seed": (0, 2**32 - 1), "dataloader_num_workers": (0, MOST_WORKERS)}
    check_ranges(training_arguments, **ranges)
    if training_arguments.max_steps < 1 and training_arguments.max_steps != -1:  # -1: not given
        raise ValueError(f"max_steps must be at least 1, got {training_arguments.max_steps}.")


def check_codes(source: Source, vision: UniTokVisionConfig) -> None:
    """Check that a source's codes fit the tokenizer.

    Raises:
        ValueError: the codes have other dimensions.
    """
    if isinstance(source.store, CodeStore):
        names = "num_codebooks", "codebook_size", "num_positions"
        theirs, ours = [source.store.metadata[name] for name in names], [getattr(vision, name) for name in names]
        if theirs != ours:
            raise ValueError(
                "{}: the codes are for {} codebooks of {} and {} positions, ".format(source.codes, *theirs)
                + "the tokenizer's for {} codebooks of {} and {} positions.".format(*ours)
            )


def freeze_all_but(model: torch.nn.Module, trainable: list[str]) -> None:
    """Freeze all parameters except those under these prefixes.

    Raises:
        ValueError: a prefix matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in trainable:
        if not any(is_under(name, prefix) for name in names):
            raise ValueError(f"trainable has {prefix!r}, which matches no parameter of the model.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(is_under(name, prefix) for prefix in trainable))


def whole_modules(model: torch.nn.Module, prefixes: list[str]) -> list[str]:
    """List the smallest modules that contain all parameters under the prefixes, and that peft can copy and train."""
    names: set[str] = set()
    for prefix in prefixes:
        modules = dict(model.named_modules())
        name = prefix if prefix in modules else prefix.rpartition(".")[0]  # the module of a parameter
        if isinstance(modules[name], torch.nn.ModuleList | torch.nn.ModuleDict):  # containers have no forward
            names.update(whole_modules(model, [f"{name}.{child}" for child, _ in modules[name].named_children()]))
        else:
            names.add(name)
    return sorted(name for name in names if not any(is_under(name, other) for other in names - {name}))


def save_dequantized(
    model: UniTokMLLMForConditionalGeneration, processor: UniTokMLLMProcessor, folder: str | os.PathLike
) -> None:
    """Save the MLLM that `model` was loaded from, with its 4-bit weights dequantized."""
    whole = UniTokMLLMForConditionalGeneration.from_pretrained(model.config._name_or_path)
    for name, module in model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = dequantize_module_weight(module)
            whole.language_model.get_submodule(name).weight.data = weight.detach().to("cpu", torch.float32)
    save_release(whole, processor, folder, torch.float32)


def add_lora(
    model: UniTokMLLMForConditionalGeneration,
    processor: UniTokMLLMProcessor,
    arguments: MLLMArguments,
    training_arguments: TrainingArguments,
) -> PeftModel:
    """Add LoRA to every linear layer of the LLM except its output layer.

    Other trainable parts are trained and saved in full. The adapter refers to the folder of its base model. A base
    model that was joined from parts, or quantized to 4 bits, is saved to `<output_dir>/base`.

    Raises:
        ValueError: ZeRO-3 has sharded the parts of the base model, or `trainable` has tied embeddings or layers that
            LoRA trains.
    """
    output = model.get_output_embeddings()
    linear = [n for n, m in model.language_model.named_modules() if isinstance(m, torch.nn.Linear) and m is not output]
    for prefix in arguments.trainable:
        if taken := [name for name in linear if is_under(f"language_model.{name}.weight", prefix)]:
            raise ValueError(f"lora trains language_model.{taken[0]}: take {prefix} out of trainable.")
        is_tied = output.weight is model.get_input_embeddings().weight
        if is_tied and any(is_under(name, prefix) for name, p in model.named_parameters() if p is output.weight):
            raise ValueError(f"lora cannot train {prefix}: the LLM's embeddings and output are one tied weight.")
    base, sharded = Path(training_arguments.output_dir, "base"), is_deepspeed_zero3_enabled()
    joined = not arguments.model or arguments.visual_model
    if sharded and (joined or arguments.load_in_4bit):
        raise ValueError("lora under ZeRO-3 needs `model` alone, the folder of a whole MLLM, and no load_in_4bit.")
    if not joined and not arguments.load_in_4bit:
        base = arguments.model
    elif training_arguments.should_save and not (base.exists() and whole_checkpoints(base.parent, WHOLE)):
        if arguments.load_in_4bit:
            save_dequantized(model, processor, base)
        else:
            put_visual_back(model)
            save_release(model, processor, base, torch.float32)
            set_visual_aside(model)
    endings = "|".join(sorted({re.escape(name.rsplit(".", 1)[-1]) for name in linear}))
    options = {"target_modules": rf"language_model\..*\.({endings})"} | arguments.lora
    config = LoraConfig(modules_to_save=whole_modules(model, arguments.trainable) or None, **options)
    trained = get_peft_model(model, config)
    for name, parameter in trained.named_parameters():
        if ".modules_to_save." in name:
            parameter.requires_grad_(any(is_under(plain_name(name), prefix) for prefix in arguments.trainable))
    trained.peft_config["default"].base_model_name_or_path = str(base)
    return trained


def log_trained_parts(trainer: MLLMTrainer) -> None:
    """Log the trained parts with their numbers of parameters and learning rates, and the length of the training."""
    groups: dict[tuple[str, float], int] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            name = plain_name(name)
            key = name.split(".")[0], trainer.learning_rate_of(name)
            groups[key] = groups.get(key, 0) + getattr(parameter, "ds_numel", parameter.numel())
    for (part, learning_rate), count in groups.items():
        logger.info("training %s: %.2f M parameters at learning rate %g", part, count / 1e6, learning_rate)
    args, samples = trainer.args, len(trainer.train_dataset)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    logger.info(
        "%d samples, %d of them a step: %d steps; after a few of them: the time that they take",
        samples,
        batch,
        args.max_steps if args.max_steps > 0 else -(-samples // batch),
    )


def training_run(trainer: MLLMTrainer, arguments: MLLMArguments, first_step: int, seconds: float) -> TrainingRun:
    """Collect the facts of a finished training for the model card."""
    args, state = trainer.args, trainer.state
    last_step = state.best_global_step if args.load_best_model_at_end else state.global_step
    history = [line for line in state.log_history if line["step"] <= last_step]
    logged = {name: value for line in history for name, value in line.items() if name.endswith("loss")}
    logged.pop("train_loss", None)  # the mean over the run, not a last value
    facts = training_facts(
        state.global_step,
        first_step,
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        args.learning_rate,
        seconds,
        args.device,
        args.world_size,
        "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "float32",
    )
    if args.load_best_model_at_end:
        facts["released"] = f"step {last_step}, of the best {args.metric_for_best_model} ({state.best_metric:.4g})"
    started_from = [name for name in (arguments.model, arguments.visual_model, arguments.llm) if name]
    return TrainingRun(started_from, arguments.datasets, arguments.card, facts, logged)


def save_results(
    trainer: MLLMTrainer, processor: UniTokMLLMProcessor, arguments: MLLMArguments, run: TrainingRun
) -> None:
    """Save `<output_dir>/release`, and with LoRA `<output_dir>/adapter`; every process must call it."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what ZeRO-3 has sharded
    if not trainer.is_world_process_zero():
        return
    state_dict = {name.removeprefix("_orig_mod."): value for name, value in state_dict.items()}  # of torch.compile
    output_dir, dtype = Path(trainer.args.output_dir), getattr(torch, arguments.release_dtype)
    if not arguments.lora:
        put_visual_back(trainer.mllm)
        visual = {f"visual.{name}": value for name, value in trainer.mllm.visual.state_dict().items()}
        save_release(trainer.mllm, processor, output_dir / "release", dtype, state_dict | visual, run)
        return

    for name, value in state_dict.items():
        check_weight(name, value)

    def write_adapter(folder: Path) -> None:
        trainer.model.save_pretrained(folder, state_dict=state_dict)
        processor.save_pretrained(folder)

    write_folder(output_dir / "adapter", write_adapter)
    merged = load_with_adapter(output_dir / "adapter").merge_and_unload()
    save_release(merged, processor, output_dir / "release", dtype, run=run)


def check_run(arguments: MLLMArguments, training_arguments: TrainingArguments) -> None:
    """Check numbers, folders and files before anything is loaded, and claim the output folder.

    Raises:
        ValueError: one of them is wrong, or another run uses the output folder.
    """
    check_numbers(training_arguments)
    if arguments.align_words and is_deepspeed_zero3_enabled():
        raise ValueError("align_words reads the LLM's token embeddings as a whole: train it without ZeRO-3.")
    claim_folder(training_arguments.output_dir, training_arguments.process_index == 0)
    for name in ("model", "visual_model", "llm", "text_tokenizer"):
        has_config = name != "text_tokenizer" and not (name == "llm" and arguments.llm_gguf_file)
        check_source(name, getattr(arguments, name), is_model=has_config)
    gguf = Path(arguments.llm, arguments.llm_gguf_file)
    if arguments.llm_gguf_file and Path(arguments.llm).is_dir() and not gguf.is_file():
        raise ValueError(f"llm_gguf_file: there is no {arguments.llm_gguf_file} in {arguments.llm}.")
    check_datasets(arguments.datasets)
    for question in arguments.sample_questions:
        load_image(question["image"])
    if resume_from := training_arguments.resume_from_checkpoint:
        if not Path(resume_from, TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {resume_from} is not a checkpoint: it has no {TRAINER_STATE_NAME}"
            )
        check_files(resume_from)


def build_datasets(
    train_sources: list[Source],
    eval_sources: list[Source],
    arguments: MLLMArguments,
    training_arguments: TrainingArguments,
    processor: UniTokMLLMProcessor,
    vision: UniTokVisionConfig,
) -> tuple[MLLMDataset, MLLMDataset | None]:
    """Build the data set for training and, if it has sources, the one for evaluation.

    Raises:
        ValueError: a source's codes are another tokenizer's, or its samples are malformed.
    """
    texts = SampleTexts(processor, arguments.max_length)
    for source in (*train_sources, *eval_sources):
        check_codes(source, vision)
        source.check_samples(texts)
    seed = training_arguments.seed if training_arguments.data_seed is None else training_arguments.data_seed

    def dataset(sources: list[Source], num_samples: int, caption_dropout: float) -> MLLMDataset:
        return MLLMDataset(sources, texts, num_samples, seed, caption_dropout, arguments.max_broken_share)

    train_dataset = dataset(train_sources, arguments.num_samples, arguments.caption_dropout)
    return train_dataset, dataset(eval_sources, 0, 0.0) if eval_sources else None


def build_trainer(
    train_sources: list[Source],
    eval_sources: list[Source],
    arguments: MLLMArguments,
    training_arguments: TrainingArguments,
    processor: UniTokMLLMProcessor,
) -> MLLMTrainer:
    """Build the trainer, with its data and its model.

    Raises:
        ValueError: see `build_datasets` and `build_model`.
    """
    vision = UniTokConfig.from_pretrained(arguments.visual_model or arguments.model).vision_config
    train_dataset, eval_dataset = build_datasets(
        train_sources, eval_sources, arguments, training_arguments, processor, vision
    )
    model = build_model(arguments, training_arguments, processor)
    flash = arguments.attn_implementation.startswith("flash")
    collator = MLLMCollator(
        pad_token_id=processor.tokenizer.pad_token_id,
        code_shape=(vision.num_codebooks, vision.num_positions),
        pack_to=arguments.max_length if arguments.packing else 0,
        one_row=arguments.packing and flash,
        no_targets=tuple(processor.tokenizer.all_special_ids) if arguments.align_words else (),
    )
    freeze_all_but(model, arguments.trainable)
    trained = add_lora(model, processor, arguments, training_arguments) if arguments.lora else model
    samples = SamplesCallback(
        processor, arguments.sample_prompts, arguments.sample_questions, arguments.sample_options or {}
    )
    trainer = MLLMTrainer(
        model=trained,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[ExpectedTimeCallback(), *[samples] * bool(arguments.sample_prompts or arguments.sample_questions)],
        learning_rates=arguments.learning_rates,
        text_loss_weight=arguments.text_loss_weight,
        image_loss_share=arguments.image_loss_share,
        word_loss=arguments.align_words,
    )
    samples.bind(trainer)
    return trainer


def train(trainer: MLLMTrainer, resume_from: str | Path | None) -> float:
    """Train to the last step, from a checkpoint if there is one.

    Returns:
        The duration in seconds.

    Raises:
        KeyboardInterrupt: a signal arrived; the message says how to go on.
        ValueError: there is nothing to release.
    """
    output_dir = Path(trainer.args.output_dir)
    try:
        result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (how_to_go_on(output_dir, WHOLE, "the same command"),)
        raise
    trainer.save_state()
    best = f"checkpoint-{trainer.state.best_global_step}"
    if trainer.args.load_best_model_at_end and Path(trainer.state.best_model_checkpoint or "").name != best:
        raise ValueError(
            "There is no best model to release: no evaluation gave a finite loss, or its checkpoint is gone."
        )
    if not trainer.state.global_step:
        raise ValueError("There is nothing to release: not a single step was made.")
    return result.metrics["train_runtime"]


def main(argv: list[str] | None = None) -> None:
    arguments, training_arguments = parse_yaml_and_command_line((MLLMArguments, TrainingArguments), argv, __doc__)
    check_trainer_options(training_arguments, evaluates=bool(arguments.eval_datasets))
    logging.basicConfig(level=logging.INFO if training_arguments.should_log else logging.ERROR)
    push = training_arguments.push_to_hub
    training_arguments.push_to_hub = False  # only the release is pushed: checkpoints lack the tokenizer
    if training_arguments.deepspeed and training_arguments.world_size > 1:
        import deepspeed  # slow: keep `--help` quick

        deepspeed.init_distributed()  # else ZeRO-3 would load the model as if there were a single process
    torch.manual_seed(training_arguments.seed)
    check_run(arguments, training_arguments)
    if push and training_arguments.hub_model_id:
        validate_repo_id(training_arguments.hub_model_id)
    train_sources = [Source(**source) for source in arguments.datasets]
    eval_sources = [Source(**source) for source in arguments.eval_datasets]
    logger.info("training on %s, %d processes", training_arguments.device, training_arguments.world_size)
    processor = build_processor(arguments)
    trainer = build_trainer(train_sources, eval_sources, arguments, training_arguments, processor)
    log_trained_parts(trainer)
    output_dir, first_step = Path(training_arguments.output_dir), 0
    if resume_from := training_arguments.resume_from_checkpoint or newest_checkpoint(output_dir, WHOLE):
        logger.info("going on from %s", resume_from)
        first_step = TrainerState.load_from_json(f"{resume_from}/trainer_state.json").global_step
    seconds = train(trainer, resume_from)
    run = training_run(trainer, arguments, first_step, seconds)
    save_results(trainer, processor, arguments, run)
    log_broken(trainer.train_dataset.broken, trainer.accelerator)
    release = output_dir / "release"
    logger.info("the model is in %s; try it: unitok-mllm ask IMAGE QUESTION --model %s", release, release)
    if push and trainer.is_world_process_zero():
        name = training_arguments.hub_model_id or output_dir.absolute().name
        private, token = training_arguments.hub_private_repo, training_arguments.hub_token
        logger.info("pushed: %s", push_release(release, name, private, token))


if __name__ == "__main__":
    one_line_errors()(main)()
