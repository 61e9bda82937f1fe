"""The training loop of the visual tokenizer, on accelerate: one process, several, or several machines.

For each accumulated batch, a step runs the forward and backward pass of the tokenizer with all terms of the loss. Once
the GAN term has started, the discriminator's passes on the same images follow. The step ends with both optimizers, the
schedules, and the running average of the weights, which is what a training releases.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.utils import make_grid, save_image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from training.augment import blur, diff_augment, draw_augmentation
from training.checkpoints import newest_checkpoint, random_state, set_random_state
from training.codebooks import FEATURES_PER_CODE, DeadCodes, gather_chunks, start_from_data
from training.discriminator import FeatureDiscriminator
from training.files import log_broken, whole_checkpoints
from training.image_text_data import EpochDataset, ImageTextDataset, ImageTextStream, sample_seed
from training.interrupts import StopRequest
from training.learning_curve import HISTORY
from training.loss_history import LossHistory
from training.losses import (
    RECONSTRUCTION_TERMS,
    TERMS,
    LossArguments,
    adaptive_gan_weight,
    discriminator_losses,
    psnr,
    tokenizer_losses,
)
from training.model_card import TrainingRun, training_facts, write_release_card
from training.optimizers import adamw, optimizer_options, set_learning_rate
from training.progress import ExpectedTime
from training.release import check_weight, write_folder
from training.resumable_batches import ResumableBatches
from training.sharding import (
    MOMENTS,
    FSDPNetwork,
    TrainedNetwork,
    WeightAverage,
    ZeroNetwork,
    checkpoint_blocks,
    zero_config,
)
from training.tokenizer_arguments import TokenizerTrainingArguments
from training.tokenizer_evaluation import evaluate_reconstructions
from training.whole_batch import whole_batch_contrastive
from unitok_mllm import UniTokModel
from unitok_mllm.image_processing_unitok import UniTokImageProcessor
from unitok_mllm.modeling_unitok import LOGIT_SCALE_BOUNDS, UniTokOutput


logger = logging.getLogger(__name__)
STATE = "state.pt"  # the file of a checkpoint that is written last
LAG = 0.01  # share of the initial weights in the released average above which a warning is logged
CODEBOOKS = "vision_model.quantizer.codebooks"
LOGIT_SCALE = "logit_scale"
SPEEDS = ("images_per_second", "data_wait_share", "decode_ms")
NOT_ON_CARD = (
    "grad_norm",
    "discriminator_grad_norm",
    *SPEEDS,
    "learning_rate",
    "revived_codes",
    "running_codebook_usage",
)


class TokenizerTrainer:
    """Trainer of a `UniTokModel`.

    Args:
        model: model to train in place; its weights stay float32.
        arguments: options of the training loop.
        losses: weights and options of the loss terms.
        train_dataset: dataset of dicts with `pixel_values`, (3, H, W) in [-1, 1], and `input_ids`, (T,). A map-style
            dataset is indexed by (epoch, index), in an order that the trainer chooses. An `ImageTextStream` that ends
            starts again with its next epoch.
        image_processor: image processor to release with the model.
        text_tokenizer: text tokenizer to release with the model.
        samples_per_epoch: samples in an epoch over all processes; required for streams, and only for them.
        perceptual: network that computes the distance of (reconstruction, pixels); required if the perceptual term has
            a weight.
        discriminator: discriminator; required if the GAN term has a weight.
        eval_pixels: images for the grids of reconstructions, (N, 3, H, W) in [-1, 1]; None for no grids.
        eval_dataset: dataset of dicts with `pixel_values`, evaluated as a whole. An iterable dataset must give each
            process its own share, and end. None to evaluate `eval_pixels`.
        run: further facts for the model card.

    Raises:
        ValueError: a term lacks its network, or a network has no term; a term would start after the last step;
            `samples_per_epoch` does not fit the kind of dataset; a tracker is not installed; the data does not fill
            one step; `output_dir` has checkpoints and `resume` is off; or the checkpoint was written with another
            global batch size, other optimizer options or, for a stream, another number of processes or workers.
    """

    def __init__(
        self,
        model: UniTokModel,
        arguments: TokenizerTrainingArguments,
        losses: LossArguments,
        train_dataset: Dataset,
        image_processor: UniTokImageProcessor | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        samples_per_epoch: int | None = None,
        perceptual: nn.Module | None = None,
        discriminator: FeatureDiscriminator | None = None,
        eval_pixels: torch.Tensor | None = None,
        run: TrainingRun | None = None,
        eval_dataset: Dataset | None = None,
    ):
        self.arguments, self.losses = arguments, losses
        self.train_dataset, self.eval_pixels, self.eval_dataset = train_dataset, eval_pixels, eval_dataset
        self.image_processor, self.text_tokenizer = image_processor, text_tokenizer
        self.output_dir, self.run = Path(arguments.output_dir), run or TrainingRun()
        if missing := set(arguments.report_to) - set(map(str, get_available_trackers())):
            raise ValueError(f"report_to names {', '.join(sorted(missing))}, which is not installed.")
        self.accelerator = Accelerator(
            cpu=arguments.use_cpu,
            mixed_precision="bf16" if arguments.bf16 else "no",
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            log_with=arguments.report_to or None,
            project_dir=arguments.output_dir,
        )
        self._check_networks(model, perceptual, discriminator)
        self._count_steps(samples_per_epoch)
        self._freeze_what_no_term_trains(model)
        if arguments.gradient_checkpointing:
            checkpoint_blocks(model, arguments.gradient_checkpointing_share)
        if arguments.compile:
            for part in (model.vision_model.encoder, model.decoder, discriminator):
                if part is not None:
                    part.compile()
        self.perceptual = None if perceptual is None else perceptual.to(self.accelerator.device)
        model.clamp_logit_scale()
        self.tokenizer = self._tokenizer_network(model.train())
        quantizer = model.vision_model.quantizer
        quantizer.rotation_trick = arguments.rotation_trick
        self.dead_codes = DeadCodes(quantizer.usage)
        quantizer.register_forward_pre_hook(self._keep_features, with_kwargs=True)
        self.ema = WeightAverage(self.tokenizer)
        self.discriminator = None
        if discriminator is not None:
            self._last_layer = model.decoder.up_conv4.conv2
            self._last_layer.register_forward_pre_hook(self._keep_last_inputs)
            self.discriminator = self._discriminator_network(discriminator)
        self.step = 0
        self.history = LossHistory(self.accelerator)
        set_seed(arguments.seed, device_specific=True)
        if whole_checkpoints(self.output_dir, STATE):
            if not arguments.resume:
                raise ValueError(f"{self.output_dir} has checkpoints: set resume, or choose another output_dir.")
            self._load_checkpoint(newest_checkpoint(self.output_dir, STATE))

    def _check_networks(self, model: UniTokModel, perceptual: nn.Module | None, discriminator: nn.Module | None):
        present = {"perceptual": perceptual, "gan": discriminator, "contrastive": model.text_model}
        for name, network in present.items():
            weight = vars(self.losses)[f"{name}_weight"]
            if weight and network is None:
                raise ValueError(f"{name}_weight is {weight}, but its network is missing.")
            if not weight and network is not None and name != "contrastive":
                raise ValueError(f"A network for the term {name} was given, but {name}_weight is 0.")

    def _count_steps(self, samples_per_epoch: int | None) -> None:
        arguments = self.arguments
        if (samples_per_epoch is None) == isinstance(self.train_dataset, ImageTextStream):
            raise ValueError(f"samples_per_epoch is required for streams, and only for them, got {samples_per_epoch}.")
        self.images_per_step = (
            arguments.per_device_train_batch_size
            * arguments.gradient_accumulation_steps
            * self.accelerator.num_processes
        )
        length = len(self.train_dataset) if samples_per_epoch is None else samples_per_epoch
        self.steps_per_epoch = length // self.images_per_step
        if not self.steps_per_epoch:
            raise ValueError(f"{length} images are too few for one step of {self.images_per_step}.")
        self.total_steps = arguments.max_steps or arguments.num_train_epochs * self.steps_per_epoch
        for name in TERMS:
            weight, start = (vars(self.losses)[f"{name}_{what}"] for what in ("weight", "start"))
            if weight and start > (self.total_steps - 1) / self.total_steps:
                raise ValueError(f"{name}_start is {start}: none of the {self.total_steps} steps begins that late.")

    def _freeze_what_no_term_trains(self, model: UniTokModel) -> None:
        """Freeze parameters that no term trains: DistributedDataParallel waits for the gradients of all others."""
        if not self.losses.contrastive_weight:
            if model.text_model is not None:
                model.text_model.requires_grad_(False)
                model.logit_scale.requires_grad_(False)
            model.vision_model.fc_norm.requires_grad_(False)
            model.vision_model.projection.requires_grad_(False)

    def _tokenizer_network(self, model: UniTokModel) -> TrainedNetwork:
        arguments, accelerator = self.arguments, self.accelerator

        def optimizer(model: UniTokModel) -> torch.optim.AdamW:
            betas = arguments.adam_beta1, arguments.adam_beta2
            optimizer = adamw(model, arguments.learning_rate, betas, arguments.weight_decay, arguments.adam_epsilon)
            if arguments.codebook_learning_rate:
                set_learning_rate(optimizer, model.vision_model.quantizer.codebooks, arguments.codebook_learning_rate)
            return optimizer

        parts = accelerator, model, optimizer, self._schedule(arguments.warmup, self.total_steps)
        if arguments.fsdp:
            return FSDPNetwork(*parts, arguments.max_grad_norm)
        if not arguments.deepspeed:
            return TrainedNetwork(*parts, arguments.max_grad_norm)
        config = zero_config(
            arguments.deepspeed,
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            accelerator.num_processes,
            arguments.max_grad_norm,
        )
        if arguments.compile and config["zero_optimization"]["stage"] == 3:
            raise ValueError(f"compile is not supported with ZeRO-3, which {arguments.deepspeed} asks for.")
        return ZeroNetwork(*parts, arguments.max_grad_norm, config=config)

    def _discriminator_network(self, discriminator: FeatureDiscriminator) -> TrainedNetwork:
        """Wrap the discriminator. It is replicated, since its heads are too small to be worth sharding."""
        arguments = self.arguments

        def optimizer(discriminator: FeatureDiscriminator) -> torch.optim.AdamW:
            betas = arguments.discriminator_beta1, arguments.discriminator_beta2
            rate, decay = arguments.discriminator_learning_rate, arguments.discriminator_weight_decay
            return adamw(discriminator, rate, betas, decay, arguments.discriminator_adam_epsilon)

        steps = self.total_steps - math.ceil(self.losses.gan_start * self.total_steps)
        schedule = self._schedule(arguments.discriminator_warmup, steps)
        return TrainedNetwork(self.accelerator, discriminator, optimizer, schedule, arguments.max_grad_norm)

    def _schedule(self, warmup: float, steps: int) -> Callable[[torch.optim.Optimizer], LambdaLR]:
        return partial(
            get_cosine_with_min_lr_schedule_with_warmup,
            num_warmup_steps=round(warmup * self.total_steps),
            num_training_steps=steps,
            min_lr_rate=self.arguments.final_learning_rate,
        )

    def _keep_features(self, quantizer: nn.Module, args: tuple[torch.Tensor], kwargs: dict) -> None:
        """Keep the features of images, but not of reconstructions, to initialize codes from them."""
        if kwargs.get("track_usage", True):
            self._features = args[0].detach()

    def _keep_last_inputs(self, layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        self._last_inputs = args[0].detach()

    def train(self) -> None:
        """Train to the last step, and write `<output_dir>/release`.

        Raises:
            Interrupted: a signal arrived. The current step was finished and saved in a checkpoint.
        """
        arguments, accelerator = self.arguments, self.accelerator
        if arguments.report_to:
            config = asdict(arguments) | asdict(self.losses)
            config = {name: value for name, value in config.items() if isinstance(value, (bool, int, float, str))}
            accelerator.init_trackers("tokenizer", config=config)
        self._log_start()
        bar = tqdm(total=self.total_steps, initial=self.step, disable=not accelerator.is_main_process)
        if self.step == 0 and arguments.codebook_start == "data":
            self._start_codebooks_from_data()
        batches, logging_steps = self._batches(), arguments.logging_steps or -(-self.total_steps // 50)
        logged_at, logged_step = start, first_step = time.perf_counter(), self.step
        expected_time, waited = ExpectedTime(self.total_steps), 0.0
        with StopRequest(accelerator) as stopping, bar:
            while self.step < self.total_steps:
                weights = self.losses.weights(self.step / self.total_steps)
                asked_at = time.perf_counter()
                step_batches = list(islice(batches, arguments.gradient_accumulation_steps))
                waited += time.perf_counter() - asked_at
                self._train_on_step(step_batches, weights)
                self.ema.update(arguments.ema_decay_after(self.step))
                self.step += 1
                bar.update()
                expected_time(self.step)
                if arguments.revive_dead_codes and self.step % arguments.revive_dead_codes == 0:
                    self._revive_dead_codes()
                last, told = self.step == self.total_steps, stopping.is_due()
                log, save = (last or self.step % steps == 0 for steps in (logging_steps, arguments.save_steps))
                save = save or told
                if log or save:
                    means = self.history.means()
                if log:
                    now = time.perf_counter()
                    means |= self._speed((self.step - logged_step) * self.images_per_step, now - logged_at, waited)
                    means["learning_rate"] = self.tokenizer.schedule.get_last_lr()[0]
                    self._report(means)
                    self.history.clear()
                    waited, logged_at, logged_step = 0.0, now, self.step
                if last or self.step % arguments.eval_steps == 0:
                    if means := self.evaluate():
                        self._report(means)
                    self._save_grid()
                if save:
                    self._save_checkpoint()
                if told:
                    stopping.stop()
        self.run.facts = training_facts(
            self.total_steps,
            first_step,
            self.images_per_step,
            arguments.learning_rate,
            time.perf_counter() - start,
            accelerator.device,
            accelerator.num_processes,
            "bf16 autocast" if arguments.bf16 else "float32",
        )
        self._save_release()
        if isinstance(self.train_dataset, ImageTextDataset | ImageTextStream):
            log_broken(self.train_dataset.broken, accelerator)
        accelerator.end_training()

    @torch.no_grad()
    def _start_codebooks_from_data(self) -> None:
        module = self.tokenizer.module
        quantizer, chunks = module.vision_model.quantizer, []
        stream = self.train_dataset if isinstance(self.train_dataset, ImageTextStream) else None
        position = stream and stream.state_dict()
        batches = self._batches()
        module.eval()
        while sum(part.shape[1] for part in chunks) < FEATURES_PER_CODE * quantizer.codebook_size:
            self.tokenizer.inference(next(batches)["pixel_values"].to(self.accelerator.device))
            chunks.append(gather_chunks(quantizer, self._features))
        module.train()
        codebooks = start_from_data(
            torch.cat(chunks, dim=1), quantizer.codebook_size, self._generator("codebook_start")
        )
        self.tokenizer.write(CODEBOOKS, codebooks)
        self.ema.start()
        if stream is not None:
            stream.load_state_dict(position)  # training starts with the same images

    @torch.no_grad()
    def _revive_dead_codes(self) -> None:
        network, quantizer = self.tokenizer, self.tokenizer.module.vision_model.quantizer
        chunks = gather_chunks(quantizer, self._features)
        is_moved, places = self.dead_codes.revive(chunks, self._generator("revive_dead_codes"))
        network.write(CODEBOOKS, torch.where(is_moved, places, network.read(CODEBOOKS)))
        for moment in MOMENTS:
            network.write(CODEBOOKS, network.read(CODEBOOKS, moment) * ~is_moved, moment)
        self.ema.write(CODEBOOKS, is_moved, places)
        self.history.record(self.step, {"revived_codes": is_moved[..., 0].sum()})

    def _speed(self, images: int, seconds: float, waited: float) -> dict[str, float]:
        """Compute the throughput, and how much of the time goes into data loading.

        Args:
            images: number of images since the last log, over all processes.
            seconds: time since the last log.
            waited: seconds of it in which this process waited for batches.

        Returns:
            `images_per_second`; `data_wait_share`, the share of time spent waiting, averaged over processes; and
            `decode_ms`, the time per image in a worker of this process, if known.
        """
        share = torch.tensor(waited / seconds, device=self.accelerator.device)
        speed = {"images_per_second": images / seconds}
        speed["data_wait_share"] = self.accelerator.reduce(share, "mean").item()
        if isinstance(self.train_dataset, EpochDataset):
            decode = 1000 * self.train_dataset.clock.mean_since()
            speed |= {"decode_ms": decode} if math.isfinite(decode) else {}
        return speed

    def _generator(self, purpose: str) -> torch.Generator:
        """Create a random generator that is the same on every process and after resuming."""
        return torch.Generator().manual_seed(sample_seed(self.arguments.seed, purpose, self.step))

    def _log_start(self) -> None:
        """Log the sizes and learning rates of the networks, and the number of steps."""
        for name, network in (("tokenizer", self.tokenizer), ("discriminator", self.discriminator)):
            if network is not None:
                rate = network.optimizer.param_groups[0]["initial_lr"]
                count = sum(p.numel() for p in network.module.parameters() if p.requires_grad)
                logger.info("training the %s: %.2f M parameters at learning rate %g", name, count / 1e6, rate)
        logger.info(
            "%d steps of %d images, %d of them done; after a few more: the time that they take",
            self.total_steps,
            self.images_per_step,
            self.step,
        )

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Iterate endlessly over batches, from the current step on."""
        arguments, accelerator = self.arguments, self.accelerator
        dataset = self.train_dataset
        stream = dataset if isinstance(dataset, ImageTextStream) else None
        options = {"batch_size": arguments.per_device_train_batch_size, "drop_last": True}
        if stream is None:
            batches = ResumableBatches(
                self.steps_per_epoch * arguments.gradient_accumulation_steps,
                len(dataset),
                arguments.per_device_train_batch_size,
                accelerator.process_index,
                accelerator.num_processes,
                arguments.seed,
                first=self.step * arguments.gradient_accumulation_steps,
            )
            options = {"batch_sampler": batches}
        loader = DataLoader(
            dataset,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(arguments.seed),  # else it would use the training's random numbers
            **options,
        )
        if stream is None:
            yield from loader
        was_resumed = bool(stream.positions)
        for epoch in count(stream.epoch):
            stream.set_epoch(epoch)
            batch = None
            for batch in loader:
                stream.record(batch.pop("stream_position")[-1])
                yield batch
            if batch is None and not was_resumed:
                raise ValueError(
                    f"The stream does not have the {arguments.per_device_train_batch_size} images of a batch."
                )
            was_resumed = False

    def _train_on_step(self, batches: list[dict[str, torch.Tensor]], weights: dict[str, float]) -> None:
        """Run the passes and updates of one step on its accumulated batches."""
        device, losses = self.accelerator.device, self.losses
        batches = [{name: value.to(device, non_blocking=True) for name, value in batch.items()} for batch in batches]
        draws = [None] * len(batches)
        progress = self.step / self.total_steps
        if losses.gan_weight > 0 and progress >= losses.gan_start:
            draws = self._augmentations(len(batches))
        cached = [None] * len(batches)
        if self.arguments.whole_batch_negatives and losses.contrastive_weight:
            cached = whole_batch_contrastive(self.tokenizer, batches)
        for batch, augmentation, contrastive in zip(batches, draws, cached):
            self._train_on(batch, weights, progress, augmentation, contrastive)

    def _augmentations(self, num_batches: int) -> list[torch.Tensor]:
        """Sample the discriminator's augmentations of a step, (B, 7) for each accumulated batch.

        They are sampled for all images of the step, in the order of its batches, so that they do not depend on the
        number of processes.
        """
        accelerator = self.accelerator
        draws = draw_augmentation(self.images_per_step, self._generator("augmentation"))
        shares = draws.chunk(num_batches * accelerator.num_processes)
        return [
            share.to(accelerator.device) for share in shares[accelerator.process_index :: accelerator.num_processes]
        ]

    def _train_on(
        self,
        batch: dict[str, torch.Tensor],
        weights: dict[str, float],
        progress: float,
        draws: torch.Tensor | None,
        contrastive: tuple[torch.Tensor, Callable[[UniTokOutput], torch.Tensor]] | None,
    ) -> None:
        """Run the passes of one batch, and the updates if it is the last one of its step.

        Args:
            batch: the batch of this process.
            weights: current weight of each term.
            progress: finished share of the training, in [0, 1).
            draws: augmentations for the discriminator, (B, 7); None if the GAN term is off.
            contrastive: entry of `whole_batch_contrastive` for this batch; None for negatives from this batch only.
        """
        accelerator, losses, pixels = self.accelerator, self.losses, batch["pixel_values"]
        tokenizer, discriminator = self.tokenizer, self.discriminator
        gan_on = draws is not None
        replicated = [network.wrapped for network in self._networks()[: 1 + gan_on] if type(network) is TrainedNetwork]
        with accelerator.accumulate(*replicated):
            if contrastive is not None:
                set_random_state(contrastive[0], accelerator.device)
            output = tokenizer.wrapped(
                pixels,
                input_ids=batch["input_ids"] if losses.contrastive_weight else None,
                with_entropy=losses.entropy_weight > 0,
                with_reconstruction_embeds=losses.consistency_weight > 0,
            )
            reconstruction = output.reconstruction
            if gan_on:  # gradients stop here, to be balanced before they go on to the decoder
                output.reconstruction = reconstruction.detach().requires_grad_()
            whole = None if contrastive is None else contrastive[1](output)
            total, values = tokenizer_losses(output, pixels, weights, self.perceptual, whole)
            values["loss"] = total.detach()
            if gan_on:
                sigma = losses.blur_sigma(progress, pixels.shape[-1])
                fake = blur(output.reconstruction, sigma)
                values["gan"] = -self._frozen_discriminator(diff_augment(fake, draws)).mean()
                total = self._balance_gan(values, weights, output.reconstruction, reconstruction)
            values["psnr"] = psnr(reconstruction.detach(), pixels).mean()
            values["running_codebook_usage"] = output.codebook_usage
            self.dead_codes.count(output.codes)
            tokenizer.backward(total)
            if (norm := tokenizer.update()) is not None:
                values["grad_norm"] = norm
                self._clamp_logit_scale()
            if gan_on:
                total, named = discriminator_losses(
                    discriminator.wrapped, blur(pixels, sigma), fake.detach(), draws, losses.gan_consistency_weight
                )
                values |= named
                discriminator.backward(total)
                if (norm := discriminator.update()) is not None:
                    values["discriminator_grad_norm"] = norm
        self.history.record(self.step, values)

    def _balance_gan(
        self,
        values: dict[str, torch.Tensor],
        weights: dict[str, float],
        detached: torch.Tensor,
        reconstruction: torch.Tensor,
    ) -> torch.Tensor:
        """Add the GAN term with an adaptive weight, which balances its gradient with the other terms'.

        Args:
            values: terms of the loss by name; gets the adaptive weight, and the GAN term in `loss`.
            weights: weight of each term.
            detached: the reconstruction from which the terms were computed, (B, 3, H, W).
            reconstruction: the same with its graph, (B, 3, H, W).

        Returns:
            A loss with the gradients of all terms.
        """
        balanced = sum(weights[name] * values[name] for name in RECONSTRUCTION_TERMS if name in values)
        gradient, gan_gradient = (torch.autograd.grad(loss, detached)[0] for loss in (balanced, values["gan"]))
        adaptive = adaptive_gan_weight(gradient, gan_gradient, self._last_inputs, self._last_layer)
        del self._last_inputs  # as large as many images
        values["gan_adaptive_weight"] = adaptive
        values["loss"] = values["loss"] + weights["gan"] * adaptive * values["gan"].detach()
        others = values.keys() & set(TERMS).difference(RECONSTRUCTION_TERMS, ["gan"])
        total = sum(weights[name] * values[name] for name in sorted(others))
        return total + ((gradient + weights["gan"] * adaptive * gan_gradient) * reconstruction).sum()

    def _frozen_discriminator(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the discriminator's logits without training the discriminator."""
        discriminator = self.discriminator.module
        discriminator.heads.requires_grad_(False)
        logits = discriminator(images)
        discriminator.heads.requires_grad_(True)
        return logits

    def _clamp_logit_scale(self) -> None:
        if self.tokenizer.module.logit_scale is not None:
            self.tokenizer.clamp(LOGIT_SCALE, *LOGIT_SCALE_BOUNDS)

    def _note_on_card(self, values: dict[str, float]) -> None:
        self.run.losses |= {name: value for name, value in values.items() if name not in NOT_ON_CARD}

    def _report(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        self._note_on_card(values)
        if self.accelerator.is_main_process:
            line = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            tqdm.write(f"step {self.step}/{self.total_steps}  {line}")
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with (self.output_dir / HISTORY).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")

    def evaluate(self) -> dict[str, float]:
        """Evaluate the averaged weights on the evaluation set; every process must call it.

        Returns:
            The metrics, see `evaluate_reconstructions`. Empty without an evaluation set.

        Raises:
            ValueError: the evaluation set has no images.
        """
        if self.eval_dataset is None and self.eval_pixels is None:
            return {}
        with self._averaged_weights():
            return evaluate_reconstructions(self.tokenizer, self._eval_batches())

    def _eval_batches(self) -> Iterator[torch.Tensor]:
        """Iterate over the pixels (B, 3, H, W) of this process's share of the evaluation set."""
        arguments, accelerator = self.arguments, self.accelerator
        dataset = TensorDataset(self.eval_pixels) if self.eval_dataset is None else self.eval_dataset
        if not isinstance(dataset, IterableDataset):
            dataset = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
        loader = DataLoader(
            dataset,
            arguments.per_device_train_batch_size,
            num_workers=arguments.dataloader_num_workers,
            generator=torch.Generator(),  # else it would use the training's random numbers
        )
        for batch in loader:
            pixels = batch[0] if self.eval_dataset is None else batch["pixel_values"]
            yield pixels.to(accelerator.device)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Context manager with the averaged weights in the tokenizer, in eval mode."""
        module = self.tokenizer.module
        module.eval()
        try:
            with self.ema:
                yield
        finally:
            module.train()

    @torch.no_grad()
    def _save_grid(self) -> None:
        """Save a grid of originals above their reconstructions by the averaged weights, as PNG and to the trackers."""
        if self.eval_pixels is None:
            return
        pixels = self.eval_pixels.to(self.accelerator.device)
        with self._averaged_weights():
            reconstruction = self.tokenizer.inference(pixels).reconstruction.float().clamp(-1, 1)
        if not self.accelerator.is_main_process:
            return
        rows = torch.stack([pixels, reconstruction]).flatten(0, 1)
        grid = make_grid(rows, nrow=len(pixels), normalize=True, value_range=(-1, 1)).cpu()
        path = self.output_dir / "samples" / f"step-{self.step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(grid, path)
        for tracker in self.accelerator.trackers:
            tracker.log_images({"reconstructions": grid[None]}, step=self.step)

    def _save_checkpoint(self) -> None:
        self.dead_codes.chosen = self.dead_codes.chosen_by_any()
        stream = self.train_dataset.state_dict() if isinstance(self.train_dataset, ImageTextStream) else None
        of_processes = gather_object([(random_state(self.accelerator.device), stream, self.history.state_dict())])
        tensors = self._weights() | {
            f"{name}_moments": network.moments() for name, network in self._named_networks().items()
        }
        if self.accelerator.is_main_process:
            write_folder(
                self.output_dir / f"checkpoint-{self.step}",
                lambda folder: self._write_checkpoint(folder, tensors, *zip(*of_processes)),
            )
            checkpoints = list(whole_checkpoints(self.output_dir, STATE).values())
            for checkpoint in checkpoints[: -self.arguments.save_total_limit]:
                shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(
        self,
        folder: Path,
        tensors: dict[str, dict[str, torch.Tensor]],
        random_states: tuple[dict],
        streams: tuple[dict | None],
        histories: tuple[dict],
    ) -> None:
        for name, named in tensors.items():
            save_file(named, folder / f"{name}.safetensors")
        state = {
            "step": self.step,  # also gives the data position, except for streams
            "images_per_step": self.images_per_step,
            "random_states": random_states,
            "streams": streams,
            "lanes": self._lanes,
            "histories": histories,
            "chosen_codes": self.dead_codes.chosen.cpu(),
            "options": [optimizer_options(network.optimizer) for network in self._networks()],
            "updates": [network.updates for network in self._networks()],
        }
        torch.save(state, folder / STATE)

    def _load_checkpoint(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if state["images_per_step"] != self.images_per_step:
            raise ValueError(
                f"{folder} was written with {state['images_per_step']} images per step, now there are "
                f"{self.images_per_step}: its position in the data would not be the same."
            )
        if isinstance(self.train_dataset, ImageTextStream):
            self._load_stream(folder, state)
        for index, (name, network) in enumerate(self._named_networks().items()):
            network.load_state_dict(load_file(folder / f"{name}.safetensors"))
            given = then = optimizer_options(network.optimizer)
            if "updates" in state:
                then = state["options"][index]
                network.load_moments(load_file(folder / f"{name}_moments.safetensors"), state["updates"][index])
            elif type(network) is TrainedNetwork:  # older checkpoints exist only for this kind
                network.load_optimizer(state["optimizers"][index])
                then = optimizer_options(network.optimizer)
            else:
                raise ValueError(
                    f"{folder} was written by an older version: it cannot be resumed with another sharding."
                )
            if then != given:
                raise ValueError(f"{folder} was trained with {then}, now there are {given}: resume with the same.")
        average = load_file(folder / "ema.safetensors")
        for name, part in self.ema.parts.items():
            part.copy_(self.tokenizer.part_of(name, average[name]))
        self.dead_codes.chosen.copy_(state.get("chosen_codes", self.dead_codes.chosen))  # older checkpoints lack it
        self.step = state["step"]
        if len(state["random_states"]) == self.accelerator.num_processes:
            set_random_state(state["random_states"][self.accelerator.process_index], self.accelerator.device)
            if "histories" in state:  # older checkpoints have none
                self.history.load_state_dict(state["histories"][self.accelerator.process_index])
        if (history := self.output_dir / HISTORY).is_file():  # for the model card, if no step is left to run
            for values in map(json.loads, history.read_text(encoding="utf-8").splitlines()):
                if values.pop("step") <= self.step:
                    self._note_on_card(values)
        self.accelerator.print(f"resumed from {folder}")

    @property
    def _lanes(self) -> int:
        """Number of lanes in which each process reads a stream, one per worker."""
        return max(1, self.arguments.dataloader_num_workers)

    def _load_stream(self, folder: Path, state: dict) -> None:
        then = len(state.get("streams", ())), state.get("lanes", 0)
        now = self.accelerator.num_processes, self._lanes
        if then != now:
            raise ValueError(
                f"{folder} was written by {then[0]} processes that read the stream with {then[1]} workers each, now there "
                f"are {now[0]} with {now[1]}: it would not resume at the same sample."
            )
        self.train_dataset.load_state_dict(state["streams"][self.accelerator.process_index])

    def _named_networks(self) -> dict[str, TrainedNetwork]:
        networks = {"model": self.tokenizer, "discriminator": self.discriminator}
        return {name: network for name, network in networks.items() if network is not None}

    def _networks(self) -> list[TrainedNetwork]:
        return list(self._named_networks().values())

    def _weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Gather the networks' weights and the averaged ones on the first process; every process must call it."""
        weights = {name: network.state_dict() for name, network in self._named_networks().items()}
        with self.ema:
            return weights | {"ema": self.tokenizer.state_dict()}

    def _save_release(self) -> None:
        lag = math.prod(map(self.arguments.ema_decay_after, range(self.total_steps)))
        if lag > LAG and self.accelerator.is_main_process:
            logger.warning(
                "The released weights are an average that lags behind: after %d steps, %.0f%% of it is still the initial "
                "weights. Set ema_warmup, a smaller ema_decay, or more steps.",
                self.total_steps,
                100 * lag,
            )
        with self.ema:
            weights = self.tokenizer.state_dict()
        for name, value in weights.items():
            check_weight(name, value)

        def write(folder: Path) -> None:
            self.tokenizer.module.save_pretrained(folder, state_dict=weights)
            for part in (self.image_processor, self.text_tokenizer):
                if part is not None:
                    part.save_pretrained(folder)
            write_release_card(folder, self.output_dir / "release", self.run)

        if self.accelerator.is_main_process:
            write_folder(self.output_dir / "release", write)
        self.accelerator.wait_for_everyone()
