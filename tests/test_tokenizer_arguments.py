"""Options of the tokenizer trainer that are refused."""

import math

import pytest

from training.tokenizer_arguments import TokenizerTrainingArguments


RATES = ("learning_rate", "adam_beta1", "adam_epsilon", "weight_decay", "warmup", "final_learning_rate", "ema_decay")
RATES += ("max_grad_norm", "discriminator_learning_rate", "discriminator_beta2", "discriminator_weight_decay")
RATES += ("discriminator_adam_epsilon",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("num_train_epochs", "eval_steps")),
        *(({name: value}, f"{name} .{value}. is not between") for name in RATES for value in (math.nan, -0.1)),
        ({"learning_rate": 0.0}, "learning_rate .0.0. is not between"),
        ({"max_steps": -1}, "max_steps .-1. is not between"),
        ({"max_steps": 2.5}, "max_steps must be of type int, got 2.5"),
        ({"ema_decay": 7.0}, "ema_decay .7.0. is not between"),
        ({"ema_decay": 1.0}, "ema_decay .1.0. is not between"),
        ({"adam_beta2": 1.0}, "adam_beta2 .1.0. is not between"),
        ({"discriminator_warmup": 2.0}, "discriminator_warmup .2.0. is not between"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers .-1. is not between"),
        ({"seed": -1}, "seed .-1. is not between"),
        ({"bf16": "yes"}, "bf16 must be of type bool, got 'yes'"),
        ({"report_to": "wandb"}, "report_to must be of type list, got 'wandb'"),
    ],
)
@pytest.mark.attack
def test_training_arguments_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TokenizerTrainingArguments(**wrong)
