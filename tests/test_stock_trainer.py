"""The library's own Trainer on an MLLM, without this project's."""

import copy

import pytest
import torch
from test_modeling_unitok_mllm import IMAGE, make_batch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments


NAMES = ["read", "write", "mixed", "text"]


def collate(names):
    """A batch whose labels cover image positions, so that the Trainer counts them."""
    batch = make_batch(names)
    return batch | {"labels": torch.where(batch["input_ids"] == IMAGE, IMAGE, batch["labels"])}


def first_step(model, folder, data_collator=collate, names=NAMES, **options):
    """Loss and gradient norm that the Trainer logs for one step."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        max_grad_norm=1e9,
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=list(names), data_collator=data_collator)
    trainer.train()
    return [trainer.state.log_history[0][name] for name in ("loss", "grad_norm")]


def test_an_accumulated_step_is_that_of_the_whole_batch(lively_mllm, tmp_path):
    whole = first_step(lively_mllm, tmp_path, per_device_train_batch_size=4)
    for size in (1, 2):
        steps = 4 // size
        parts = first_step(lively_mllm, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-4, atol=1e-4)


def test_label_smoothing_is_that_of_the_text_and_refused_for_images(lively_mllm, tmp_path):
    options = {"per_device_train_batch_size": 2, "label_smoothing_factor": 0.1}
    names = ["read", "text"]
    loss, _ = first_step(lively_mllm, tmp_path, make_batch, names, **options)
    batch = make_batch(names)
    batch.pop("image_targets")
    logits = lively_mllm(**batch).logits[:, :-1].flatten(0, 1).float()
    expected = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    assert loss == pytest.approx(expected.item(), abs=1e-3)
    with pytest.raises(ValueError, match="Label smoothing"):
        first_step(lively_mllm, tmp_path, **options)
