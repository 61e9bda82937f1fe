"""The Trainer of transformers, with what training an MLLM on mixed data needs beyond it.

* One loss whatever the number of processes and of accumulated batches: sums over targets, divided by their number in
  the whole global batch.
* Samples in the dataset's own order (which is shuffled, see `training.data.MLLMDataset`).
* A learning rate for each part, and no weight decay on parameters of fewer than two dims.
* Each loss logged under its own name, with tokens and images per second.
* Checkpoints that count only once they are whole.
"""

import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler
from torchvision.transforms.functional import to_tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from training.files import whole_checkpoints
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.sheet import contact_sheet


WHOLE = "whole"  # a checkpoint folder without this file in it was broken off
COUNTS = ("text_sum", "text_count", "image_sum", "image_count", "tokens", "images")


def unwrapped(model: torch.nn.Module) -> UniTokMLLMForConditionalGeneration:
    """The MLLM inside LoRA's wrapper, if it has one."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def set_visual_aside(model: UniTokMLLMForConditionalGeneration) -> None:
    """Takes the frozen tokenizer out of the tree of modules, where it stays reachable as `model.visual`: it need not
    be wrapped, sharded, optimized or written into every checkpoint."""
    model.__dict__["visual"] = model._modules.pop("visual")


def put_visual_back(model: UniTokMLLMForConditionalGeneration) -> None:
    """Undoes `set_visual_aside`."""
    model.visual = model.__dict__.pop("visual")


def is_under(name: str, prefix: str) -> bool:
    """Whether a parameter's name is the prefix, or goes on from it after a dot."""
    return f"{name}.".startswith(f"{prefix}.")


class MLLMTrainer(Trainer):
    """Trains a `UniTokMLLMForConditionalGeneration`, bare or under LoRA, whose `visual` is set aside.

    Args:
        learning_rates: by prefix of a parameter's name ("depth_head", "embedder.projection"); the longest that fits
            wins, and `args.learning_rate` where none does.
        text_loss_weight: weight of the mean text loss, that of the image loss being the rest; 0 to weigh both by their
            numbers of targets.
        image_loss_share: see the model's `forward`.
    """

    def __init__(
        self,
        *args,
        learning_rates: dict[str, float] | None = None,
        text_loss_weight: float = 0.0,
        image_loss_share: float = 1.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the counts of the whole step
        self.learning_rates = learning_rates or {}
        self.text_loss_weight, self.image_loss_share = text_loss_weight, image_loss_share
        self.mllm = unwrapped(self.model)
        self.mllm.visual.to(self.args.device)
        self._since_log = torch.zeros(len(COUNTS), dtype=torch.float64)
        self._last_log = time.perf_counter()
        self._keep = self.args.save_total_limit
        self.args.save_total_limit = None  # old checkpoints go when the new one is known to be whole

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    # --- loss ---

    def _counts(self, inputs: dict) -> torch.Tensor:
        """The numbers of text targets and of codes to draw, (2,)."""
        text = (inputs["labels"][:, 1:] != -100).sum()
        codes = (
            inputs["image_codes"][0].numel() * inputs["image_targets"].sum() if "image_codes" in inputs else 0 * text
        )
        return torch.stack([text, codes])

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """The counts of everything that goes into one step: all accumulated batches of all processes."""
        counts = torch.stack([self._counts(inputs) for inputs in batch_samples]).sum(dim=0).to(device)
        return self.accelerator.reduce(counts, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        num_tokens, counts = inputs.pop("num_tokens"), self._counts(inputs)
        if "pixel_values" in inputs:
            pixel_values, places = inputs.pop("pixel_values"), inputs.pop("pixel_places")
            inputs["image_codes"][places] = self.mllm.encode_images(pixel_values)
        share = self.image_loss_share if model.training else 1.0
        output = model(**inputs, image_loss_share=share, logits_at_targets=True)
        sums = torch.stack([output.text_loss, output.image_loss]) * counts
        num_images = len(inputs.get("image_codes", ()))
        if model.training:
            self._record(sums, counts, num_tokens, num_images)
        if num_items_in_batch is None:
            total, processes = counts, 1
        else:
            total, processes = num_items_in_batch, self.accelerator.num_processes  # gradients will be averaged
        if weight := self.text_loss_weight:
            loss = (sums / total.clamp_min(1) * sums.new_tensor([weight, 1 - weight])).sum()
        else:
            loss = sums.sum() / total.sum().clamp_min(1)
        loss = processes * loss
        return (loss, output) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    # --- logging ---

    def _record(self, sums: torch.Tensor, counts: torch.Tensor, num_tokens: torch.Tensor, num_images: int) -> None:
        values = torch.stack([sums[0].detach(), counts[0], sums[1].detach(), counts[1], num_tokens])
        self._since_log = self._since_log.to(values.device)
        self._since_log[:5] += values
        self._since_log[5] += num_images

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the losses by name and the throughput, over all processes, to each line of training.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if "loss" in logs:
            now, since = time.perf_counter(), self.accelerator.reduce(self._since_log, "sum")
            values = dict(zip(COUNTS, since.tolist()))
            for name in ("text", "image"):
                if values[f"{name}_count"]:
                    logs[f"{name}_loss"] = values[f"{name}_sum"] / values[f"{name}_count"]
                    if not math.isfinite(logs[f"{name}_loss"]):
                        raise FloatingPointError(
                            f"The {name}_loss is {logs[f'{name}_loss']} before step {self.state.global_step}."
                        )
            seconds = now - self._last_log
            logs |= {f"{name}_per_second": round(values[name] / seconds, 1) for name in ("tokens", "images")}
            self._since_log.zero_()
            self._last_log = now
        super().log(logs, *args, **kwargs)

    # --- optimizer ---

    def learning_rate_of(self, name: str) -> float:
        fitting = [prefix for prefix in self.learning_rates if is_under(name, prefix)]
        return self.learning_rates[max(fitting, key=len)] if fitting else self.args.learning_rate

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    dims = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves flat shards
                    decay = self.args.weight_decay if dims >= 2 else 0.0
                    learning_rate = self.learning_rate_of(plain_name(name))
                    groups.setdefault((learning_rate, decay), []).append(parameter)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()], **kwargs
            )
        return self.optimizer

    # --- checkpoints ---

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / WHOLE).touch()
            if self._keep:
                for folder in list(whole_checkpoints(self.args.output_dir, WHOLE).values())[: -self._keep]:
                    shutil.rmtree(folder)


def plain_name(name: str) -> str:
    """A parameter's name without what LoRA's and other wrappers put into it."""
    for wrapper in ("module.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name.replace(".modules_to_save.default", "").replace(".base_layer", "")


class SamplesCallback(TrainerCallback):
    """Draws and answers the same prompts and questions at every evaluation and at the end, to `<output_dir>/samples/`.

    Every process computes them (under ZeRO-3 they must), the first one writes.

    Args:
        prompts: what to draw.
        questions: {"image": file, "question": text} each.
        image_options: of the model's image generation.
    """

    def __init__(
        self,
        processor: UniTokMLLMProcessor,
        prompts: list[str],
        questions: list[dict],
        image_options: dict,
    ):
        self.processor, self.prompts, self.questions = processor, prompts, questions
        self.image_options = {"guidance_scale": 3.0, "seed": 0} | image_options
        self.last_step = -1

    def bind(self, trainer: MLLMTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step != self.last_step:  # the end is often an evaluation too
            self.write(Path(args.output_dir) / "samples", state.global_step)
            self.last_step = state.global_step

    on_train_end = on_evaluate

    @torch.no_grad()
    def write(self, folder: Path, step: int) -> None:
        """Writes `step-N.png` and `step-N.json`."""
        trainer, model = self.trainer, self.trainer.mllm
        was_training = model.training
        model.eval()
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            pictures = [self._draw(model, prompt) for prompt in self.prompts]
            answers = [self._answer(model, **question) for question in self.questions]
        model.train(was_training)
        if not trainer.is_world_process_zero():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if pictures:
            sheet = contact_sheet(pictures, self.prompts)
            sheet.save(folder / f"step-{step}.png")
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                if pictures:
                    callback.tb_writer.add_image("samples", to_tensor(sheet), step)
                if answers:
                    callback.tb_writer.add_text("answers", json.dumps(answers, indent=1), step)
        (folder / f"step-{step}.json").write_text(
            json.dumps({"step": step, "answers": answers}, indent=2) + "\n", encoding="utf-8"
        )

    def _draw(self, model, prompt: str):
        inputs = self.processor(text=prompt, generation_mode="image").to(model.device)
        codes = model.generate(**inputs, generation_mode="image", **self.image_options)
        return self.processor.image_processor.post_process(model.decode_images(codes).float())[0]

    def _answer(self, model, image: str, question: str) -> dict:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        inputs = self.processor.apply_chat_template(
            [turn], tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs={"images": [image]}
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answer = self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        return {"image": image, "question": question, "answer": answer}
