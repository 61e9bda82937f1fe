"""Every option of the Trainer is honoured, by the library or by this training, or refused before anything is loaded."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from training.arguments import parse_yaml_and_command_line
from training.train_mllm import MLLMArguments
from training.trainer_options import REFUSED, check_trainer_options


BY_LIBRARY = set(
    """
    output_dir per_device_train_batch_size gradient_accumulation_steps max_steps max_grad_norm
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon
    bf16 fp16 tf32 use_cpu full_determinism neftune_noise_alpha torch_empty_cache_steps
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
    log_level_replica disable_tqdm include_num_input_tokens_seen
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_on_each_node metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order dataloader_drop_last
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    deepspeed debug skip_memory_metrics local_rank
    """.split()
)
# in MLLMTrainer, in train_mllm, or together with other options in check_trainer_options
BY_US = set(
    """
    learning_rate weight_decay seed data_seed per_device_eval_batch_size save_total_limit load_best_model_at_end
    resume_from_checkpoint push_to_hub hub_token hub_private_repo hub_model_id do_train do_eval
    """.split()
)
OTHERS = {  # than those that are taken
    "num_train_epochs": 2,
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "optim_target_modules": "all-linear",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 3,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "do_predict": True,
    "save_only_model": True,
    "hub_strategy": "end",
    "hub_always_push": True,
    "hub_revision": "draft",
    "accelerator_config": {"split_batches": True},
    "remove_unused_columns": True,
    "label_names": ["labels"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "parallelism_config": {"tp_size": 2},
    "fsdp": "full_shard",
    "fsdp_config": {"fsdp_version": 2},
}


@pytest.fixture
def parse(tmp_path):
    """The Trainer's options as a config gives them."""

    def parse(**options) -> TrainingArguments:
        config = tmp_path / "run.yaml"
        config.write_text(f"model: x\noutput_dir: {tmp_path}/run\n", encoding="utf-8")
        arguments = parse_yaml_and_command_line((MLLMArguments, TrainingArguments), [str(config)])[1]
        for name, value in options.items():
            setattr(arguments, name, value)
        arguments.__post_init__()
        return arguments

    return parse


def test_every_option_of_the_library_is_sorted():
    """An option that the library adds belongs into one of the three."""
    known = {field.name for field in fields(TrainingArguments)}
    assert BY_LIBRARY | BY_US | REFUSED.keys() == known
    assert len(BY_LIBRARY) + len(BY_US) + len(REFUSED) == len(known)


def test_what_is_taken_is_what_a_config_has_by_default(parse):
    check_trainer_options(parse(), evaluates=False)
    check_trainer_options(parse(eval_strategy="steps"), evaluates=True)


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_effect_is_refused(parse, name):
    arguments = parse()
    setattr(arguments, name, OTHERS[name])
    with pytest.raises(ValueError, match=f"{name} must be .*, got .*: {REFUSED[name][1]}"):
        check_trainer_options(arguments, evaluates=False)


def test_options_that_contradict_one_another_are_refused(parse):
    best = {"eval_strategy": "steps", "load_best_model_at_end": True}
    for options, evaluates, message in (
        ({}, True, "eval_strategy is no, with eval_datasets"),
        ({"eval_strategy": "epoch"}, False, "eval_strategy is epoch, without eval_datasets"),
        ({"do_eval": True}, False, "do_eval does nothing without"),
        ({"metric_for_best_model": "loss"}, False, "metric_for_best_model is loss, but nothing is evaluated"),
        (best | {"metric_for_best_model": "eval_accuracy"}, True, "evaluations give loss, text_loss, image_loss"),
        (best | {"eval_steps": 2, "save_steps": 4}, True, "save_steps is 4 and eval_steps 2: make them equal"),
    ):
        with pytest.raises(ValueError, match=message):
            check_trainer_options(parse(**options), evaluates)
    for options in (
        best | {"eval_steps": 3, "save_steps": 3, "metric_for_best_model": "eval_image_loss"},
        best | {"eval_steps": 3, "save_strategy": "best"},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
    ):
        check_trainer_options(parse(**options), evaluates=True)


def test_an_optimizer_of_deepspeed_is_refused(parse, tmp_path):
    config = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW"},
        "train_micro_batch_size_per_gpu": "auto",
    }
    with pytest.raises(ValueError, match="The DeepSpeed config has an optimizer"):
        check_trainer_options(parse(deepspeed=config), evaluates=False)
