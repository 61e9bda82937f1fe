"""A transformers `Trainer` for training the MLLM on mixed data.

* The loss does not depend on how the global batch is split into processes and accumulated batches: it is the sum over
  all targets, divided by their number. Logged losses average over all targets since the last log in the same way, and
  evaluation losses over all targets of the evaluation set.
* Samples come in the data set's own order (which is shuffled, see `training.data.MLLMDataset`).
* Each part of the model can have its own learning rate. Parameters of fewer than two dims have no weight decay.
* Each loss is logged under its own name, with tokens and images per second.
* A checkpoint counts only once it is complete, and the best one is kept. After a signal, training finishes its step,
  writes a checkpoint and stops.
"""

import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from torchvision.transforms.functional import to_tensor
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, TrainOutput
from transformers.utils import ModelOutput

from training.data import IGNORE
from training.files import whole_checkpoints
from training.interrupts import StopRequest
from training.progress import ExpectedTime
from unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMProcessor
from unitok_mllm.inference import answer_questions, draw_images
from unitok_mllm.sheet import contact_sheet


LOSSES = "losses.json"  # in a checkpoint: the records since the last log and since the start
WHOLE = "whole"  # a checkpoint folder without this file is incomplete


def unwrapped(model: torch.nn.Module) -> UniTokMLLMForConditionalGeneration:
    """Return the MLLM without LoRA's wrapper, if it has one."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def set_visual_aside(model: UniTokMLLMForConditionalGeneration) -> None:
    """Take the frozen tokenizer out of the module tree; `model.visual` still returns it.

    It is then not wrapped, sharded, optimized or saved in checkpoints.
    """
    model.__dict__["visual"] = model._modules.pop("visual")


def put_visual_back(model: UniTokMLLMForConditionalGeneration) -> None:
    """Undo `set_visual_aside`."""
    model.visual = model.__dict__.pop("visual")


def is_under(name: str, prefix: str) -> bool:
    """Return whether a parameter's name equals the prefix, or continues it after a dot."""
    return f"{name}.".startswith(f"{prefix}.")


class EvalShare(Dataset):
    """Every n-th sample of a data set, for one of n processes.

    DDP and ZeRO need the same number of samples on all processes. Missing samples are replaced by the last one without
    its targets.
    """

    def __init__(self, dataset: Dataset, process_index: int, num_processes: int):
        self.dataset, self.process_index, self.num_processes = dataset, process_index, num_processes

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.num_processes)

    def __getitem__(self, index: int) -> dict:
        index = index * self.num_processes + self.process_index
        if index < len(self.dataset):
            return self.dataset[index]
        sample = self.dataset[len(self.dataset) - 1]
        labels, image_targets = sample["labels"], sample["image_targets"]
        return sample | {
            "labels": torch.full_like(labels, IGNORE),
            "image_targets": torch.zeros_like(image_targets),
        }


class MLLMTrainer(Trainer):
    """Trainer of a `UniTokMLLMForConditionalGeneration`, with or without LoRA, after `set_visual_aside`.

    Args:
        args: positional arguments of transformers' `Trainer`.
        learning_rates: learning rates by prefix of a parameter's name ("depth_head", "embedder.projection"). The
            longest match applies; other parameters have `args.learning_rate`.
        text_loss_weight: weight w of the mean text loss; the mean image loss has weight 1 - w. With 0, both are
            weighted by their numbers of targets.
        image_loss_share: share of image positions that the training loss is computed on, see the model's `forward`;
            evaluations use all positions.
        word_loss: whether to train the model's word loss, see its `forward`, instead of the losses of the LLM.
        kwargs: keyword arguments of transformers' `Trainer`.

    Raises:
        ValueError: a prefix of `learning_rates` matches no trained parameter.
    """

    def __init__(
        self,
        *args,
        learning_rates: dict[str, float] | None = None,
        text_loss_weight: float = 0.0,
        image_loss_share: float = 1.0,
        word_loss: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the number of targets of the whole step
        self.learning_rates = learning_rates or {}
        self.text_loss_weight, self.image_loss_share, self.word_loss = text_loss_weight, image_loss_share, word_loss
        trained = [plain_name(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for prefix in self.learning_rates:
            if not any(is_under(name, prefix) for name in trained):
                raise ValueError(f"learning_rates has {prefix!r}, which matches no trained parameter.")
        self.mllm = unwrapped(self.model)
        self.mllm.visual.to(self.args.device)
        self._since_log, self._since_start = self._new_record(), self._new_record()
        self._last_log = time.perf_counter()
        self._saved_step = 0
        self._keep = self.args.save_total_limit
        self.args.save_total_limit = None  # old checkpoints are removed only once the new one is complete

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            EvalShare(dataset, self.args.process_index, self.args.world_size),
            self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """Train as transformers' `Trainer` does, but stop after the current step if a signal arrives.

        It then writes a checkpoint, unless `save_strategy` is "no".

        Raises:
            Interrupted: a signal arrived.
        """
        if resume_from_checkpoint and (path := Path(resume_from_checkpoint, LOSSES)).is_file():  # older ones lack it
            since_log, since_start = torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float64)
            if self.is_world_process_zero():
                self._since_log[:4] = since_log[:4]  # tokens and images count from the start of this process
            self._since_start += since_start.to(self._since_start)
        try:
            with StopRequest(self.accelerator) as self._stopping:
                return super().train(resume_from_checkpoint, **kwargs)
        except KeyboardInterrupt:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.on_train_end(
                        self.args, self.state, self.control
                    )  # otherwise the bar would be printed after the last message
            raise

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        saves, is_done = self.args.save_strategy != SaveStrategy.NO, self.state.global_step == self.state.max_steps
        if self._stopping.is_due() and (saves or not is_done):  # otherwise the release is written next
            if saves and self._saved_step != self.state.global_step:
                self._save_checkpoint(model, trial)
            self._stopping.stop()

    # --- loss ---

    def _counts(self, inputs: dict) -> torch.Tensor:
        """Count text targets and target codes, (2,)."""
        text = (inputs["labels"][:, 1:] != -100).sum()
        codes = (
            inputs["image_codes"][0].numel() * inputs["image_targets"].sum() if "image_codes" in inputs else 0 * text
        )
        return torch.stack([text, codes])

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """Count the targets of a whole step: all accumulated batches of all processes."""
        counts = torch.stack([self._counts(inputs) for inputs in batch_samples]).sum(dim=0).to(device)
        return self.accelerator.reduce(counts, "sum")

    def _sums(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, ModelOutput]:
        """Run the model, and add its losses to the record.

        Returns:
            The summed losses of text targets and target codes, (2,); their numbers, (2,); and the model's output.
        """
        inputs = dict(inputs)
        num_tokens, counts = inputs.pop("num_tokens"), self._counts(inputs)
        if "pixel_values" in inputs:
            pixel_values, places = inputs.pop("pixel_values"), inputs.pop("pixel_places")
            inputs["image_codes"][places] = self.mllm.encode_images(pixel_values)
        share = self.image_loss_share if model.training else 1.0
        output = model(**inputs, image_loss_share=share, losses_alone=True, word_loss=self.word_loss)
        sums = torch.stack([output.text_loss, output.image_loss]) * counts
        record = self._since_log if model.training else self._evaluated
        record[:2] += sums.detach()
        record[2:4] += counts
        record[4] += num_tokens
        record[5] += len(inputs.get("image_codes", ()))
        return sums, counts, output

    def _new_record(self) -> torch.Tensor:
        """Create a record of zeros, (6,): summed losses and numbers of targets (text, image each), tokens, images."""
        return torch.zeros(6, dtype=torch.float64, device=self.args.device)

    def _loss(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Compute the loss from summed losses (2,) and numbers of targets (2,)."""
        if weight := self.text_loss_weight:
            return (sums / counts.clamp_min(1) * sums.new_tensor([weight, 1 - weight])).sum()
        return sums.sum() / counts.sum().clamp_min(1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        sums, counts, output = self._sums(model, inputs)
        if num_items_in_batch is None:
            loss = self._loss(sums, counts)
        else:
            loss = self.accelerator.num_processes * self._loss(sums, num_items_in_batch)  # gradients will be averaged
        return (loss, output) if return_outputs else loss

    # --- evaluation ---

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            self._sums(model, self._prepare_inputs(inputs))
        return None, None, None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        """Evaluate as transformers does, but average the losses over all targets of all processes."""
        self._evaluated = self._new_record()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        losses = self._named_losses(self.accelerator.reduce(self._evaluated, "sum"))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in losses.items()})
        return output._replace(num_samples=len(dataloader.dataset.dataset))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._last_log += time.perf_counter() - start  # exclude evaluation from the throughput
        return metrics

    # --- logging ---

    def _named_losses(self, record: torch.Tensor) -> dict[str, float]:
        """Compute the mean losses of a record; a loss without targets is left out."""
        sums, counts = record[:2], record[2:4]
        named = zip(("text_loss", "image_loss"), sums.tolist(), counts.tolist())
        losses = {name: total / count for name, total, count in named if count}
        return losses | {"loss": self._loss(sums, counts).item()}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the losses and the throughput since the last log, over all processes, to the logs of a training.

        `train_loss`, in the last log, is the mean loss of the whole run.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if "loss" in logs:
            now, since = time.perf_counter(), self.accelerator.reduce(self._since_log, "sum")
            losses = self._named_losses(since)
            for name, value in losses.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"The {name} is {value} before step {self.state.global_step}.")
            per_second = (since[4:] / (now - self._last_log)).tolist()
            logs |= losses | {f"{name}_per_second": round(n, 1) for name, n in zip(("tokens", "images"), per_second)}
            self._since_start += since
            self._since_log.zero_()
            self._last_log = now
        if "train_loss" in logs:
            whole_run = self._since_start + self.accelerator.reduce(self._since_log, "sum")
            logs["train_loss"] = self._named_losses(whole_run)["loss"]
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
            if is_optimizer_factory(optimizer_class) or kwargs.keys() & {"params", "model", "optimizer_dict"}:
                raise ValueError(
                    f"optim {self.args.optim.value} chooses its own parameters, whatever learning_rates says."
                )
            self.optimizer = optimizer_class(
                [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()], **kwargs
            )
        return self.optimizer

    # --- checkpoints ---

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Load as transformers does, but keep frozen parameters frozen, also in LoRA's copies."""
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for parameter in frozen:
            parameter.requires_grad_(False)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Warn as transformers does, except about tied weights, which a checkpoint stores only once."""
        tied = self.mllm.all_tied_weights_keys
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step
        records = [self.accelerator.reduce(self._since_log, "sum").tolist(), self._since_start.tolist()]
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / LOSSES).write_text(json.dumps(records), encoding="utf-8")
            (folder / WHOLE).touch()
            if self._keep:
                *older, newest = whole_checkpoints(self.args.output_dir, WHOLE).values()
                kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
                others = [folder for folder in older if folder.name not in kept]
                for folder in others[: max(0, len(others) + len(kept) - self._keep)]:
                    shutil.rmtree(folder)


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of LoRA and other wrappers."""
    for wrapper in ("module.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name.replace(".modules_to_save.default", "").replace(".base_layer", "")


class ExpectedTimeCallback(TrainerCallback):
    """Log the expected duration of the training, see `ExpectedTime`."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.say = ExpectedTime(state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.say(state.global_step)


class SamplesCallback(TrainerCallback):
    """Draw prompts and answer questions at every evaluation and at the end, and save the results in `samples/`.

    Every process computes them, as ZeRO-3 requires; the main process writes the files.

    Args:
        processor: the model's processor.
        prompts: prompts to draw.
        questions: questions to answer, each {"image": file, "question": text}.
        image_options: options of `generate_image_codes` that override the model's own.
    """

    def __init__(
        self,
        processor: UniTokMLLMProcessor,
        prompts: list[str],
        questions: list[dict],
        image_options: dict,
    ):
        self.processor, self.prompts, self.questions = processor, prompts, questions
        self.image_options = {"seed": 0} | image_options
        self.last_step = -1

    def bind(self, trainer: MLLMTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step != self.last_step:  # training often ends with an evaluation
            self.write(Path(args.output_dir) / "samples", state.global_step)
            self.last_step = state.global_step

    on_train_end = on_evaluate

    @torch.no_grad()
    def write(self, folder: Path, step: int) -> None:
        """Write the drawings to `step-N.png`, and the answers to `step-N.json`."""
        trainer, model = self.trainer, self.trainer.mllm
        was_training = model.training
        model.eval()
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            pictures = [self._draw(model, prompt) for prompt in self.prompts]  # unbatched: independent of each other
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
            if isinstance(callback, WandbCallback):
                wandb, logged = callback._wandb, {"train/global_step": step}
                if pictures:
                    logged["samples"] = wandb.Image(sheet)
                if answers:
                    rows = [list(answer.values()) for answer in answers]
                    logged["answers"] = wandb.Table(columns=list(answers[0]), data=rows)
                wandb.log(logged)
        (folder / f"step-{step}.json").write_text(
            json.dumps({"step": step, "answers": answers}, indent=2) + "\n", encoding="utf-8"
        )

    def _draw(self, model, prompt: str):
        return draw_images(model, self.processor, [prompt], 1, progress=False, **self.image_options)[0]

    def _answer(self, model, image: str, question: str) -> dict:
        (answer,) = answer_questions(model, self.processor, [(image, question)], max_new_tokens=32)
        return {"image": image, "question": question, "answer": answer}
