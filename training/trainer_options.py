"""Options of transformers' `Trainer` that this training does not support, refused before anything is loaded."""

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig


LOSS_ALONE = "evaluations give the losses alone"
RELEASE_ALONE = "the release is pushed, once, when it is done"
DATA_DECIDES = "the data set shuffles its samples by the seed, and batches go to the model as they are"
SHARDED_BY_DEEPSPEED = "weights are sharded by DeepSpeed alone"
# by name: the only accepted value, and why
REFUSED = {
    "num_train_epochs": (1, "one run is one pass over num_samples samples: set that instead"),
    "auto_find_batch_size": (False, "it would start over in the middle of training, with other batches"),
    "average_tokens_across_devices": (True, "the loss is always one mean over the targets of all processes"),
    "label_smoothing_factor": (0.0, "the losses are plain cross-entropies"),
    "optim_target_modules": (None, "learning_rates sets the learning rates of parts"),
    "use_liger_kernel": (False, "it does not support this kind of model"),
    "liger_kernel_config": (None, "it does not support this kind of model"),
    "use_cache": (False, "training does not use a cache"),
    "bf16_full_eval": (False, "evaluations within a training keep its precision"),
    "fp16_full_eval": (False, "evaluations within a training keep its precision"),
    "prediction_loss_only": (False, LOSS_ALONE),
    "eval_do_concat_batches": (True, LOSS_ALONE),
    "eval_use_gather_object": (False, LOSS_ALONE),
    "eval_accumulation_steps": (None, LOSS_ALONE),
    "include_for_metrics": ([], LOSS_ALONE),
    "batch_eval_metrics": (False, LOSS_ALONE),
    "do_predict": (False, LOSS_ALONE),
    "enable_jit_checkpoint": (False, "every signal that ends the training saves a checkpoint anyway"),
    "save_only_model": (False, "a checkpoint must allow resuming; the release has the weights alone"),
    "hub_strategy": ("every_save", RELEASE_ALONE),
    "hub_always_push": (False, RELEASE_ALONE),
    "hub_revision": (None, RELEASE_ALONE),
    "accelerator_config": (AcceleratorConfig(), DATA_DECIDES),
    "remove_unused_columns": (False, DATA_DECIDES),
    "label_names": ([], DATA_DECIDES),
    "train_sampling_strategy": ("random", DATA_DECIDES),
    "length_column_name": ("length", DATA_DECIDES),
    "parallelism_config": (None, SHARDED_BY_DEEPSPEED),
    "fsdp": (None, SHARDED_BY_DEEPSPEED),
    "fsdp_config": (None, SHARDED_BY_DEEPSPEED),
}
METRICS = ("loss", "text_loss", "image_loss")


def check_trainer_options(options: TrainingArguments, evaluates: bool) -> None:
    """Check that all options of the `Trainer` have an effect.

    Args:
        options: options of the `Trainer`.
        evaluates: whether there is evaluation data.

    Raises:
        ValueError: an option, or a combination of options, is not supported.
    """
    for name, (taken, reason) in REFUSED.items():
        if (value := getattr(options, name)) != taken:
            raise ValueError(f"{name} must be {taken!r}, got {value!r}: {reason}.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}.")
    if options.n_gpu > 1:
        raise ValueError(f"One process cannot train on {options.n_gpu} GPUs: start one for each, with torchrun.")
    if options.deepspeed and "optimizer" in options.hf_deepspeed_config.config:
        raise ValueError("The DeepSpeed config has an optimizer, which would ignore learning_rates: remove it.")
    if evaluates != (options.eval_strategy != "no"):
        raise ValueError(
            f"eval_strategy is {options.eval_strategy.value}, with{'' if evaluates else 'out'} eval_datasets."
        )
    if options.do_eval and not evaluates:
        raise ValueError("do_eval does nothing without eval_datasets and an eval_strategy.")
    if (metric := options.metric_for_best_model) is None:
        return
    if metric.removeprefix("eval_") not in METRICS:
        raise ValueError(f"metric_for_best_model is {metric}; evaluations give {', '.join(METRICS)}.")
    if not evaluates:
        raise ValueError(f"metric_for_best_model is {metric}, but nothing is evaluated: there are no eval_datasets.")
    if (
        options.load_best_model_at_end
        and options.save_strategy == "steps"
        and options.save_steps != options.eval_steps
    ):
        raise ValueError(
            f"load_best_model_at_end needs every evaluated model saved, but save_steps is {options.save_steps} and "
            f"eval_steps {options.eval_steps}: make them equal, or save_strategy `best`."
        )
