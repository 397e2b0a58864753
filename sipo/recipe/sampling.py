"""Draws a run's validation samples from fixed prompts and seeds; all processes share the work."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sipo.data.media import read_media, resize_and_crop, write_image_grid, write_video
from sipo.families.base import drop_text_encoders
from sipo.families.network import Condition, inner_network
from sipo.files import FileError, parse_json, read_text, write_aside
from sipo.processes import OtherProcessError, from_all, is_collective, on_main
from sipo.recipe.build import RunContext, free_memory
from sipo.training import TrainingWarning, is_sharded
from sipo.training.stopping import asked_to_stop
from sipo.training.sums import PROMPTS
from sipo.training.trackers import log_clips, log_images

SAMPLES = "samples"
"""Folder in ``training.output_dir`` that samples are written to."""

SAMPLE_FPS = 8.0
"""Frames per second of the clips that are written where ``data.fps`` does not say."""


class ValidationSamples:
    """Draws ``samples.validation_prompts``: ``samples/step-00000100.png``, or an mp4 for each prompt.

    The main process encodes the prompts once and frees the text encoders; the pipeline's VAE stays, in host memory
    until samples are drawn. Of ``W`` processes number ``r`` draws the prompts ``r``, ``r + W`` and so on. Prompt ``i``
    has the seed ``samples.seed + i``, so that samples do not depend on how many processes there are. A network that
    they hold parts of (FSDP2) is run by all of them at once; one without a prompt draws the first again.

    Args:
        run: of :func:`sipo.recipe.build.open_run`, with ``samples.validation_prompts``. Every process makes one.

    Raises:
        ValueError, FileNotFoundError: of the model's files.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.folder = run.config.training.folder / SAMPLES
        self.pipeline: Any = None
        self.images: list[Tensor] | None = None
        if run.validation_images:
            media = [read_media(path, max_pixels=run.config.data.max_pixels) for path in run.validation_images]
            self.images = [resize_and_crop(image.pixels, *run.config.data.sizes[0]).pixels for image in media]
        self.prompts: list[Condition] = from_all(run.accelerator, self._load)[0]

    def _load(self) -> list[Condition]:
        """Loads what this process needs of the pipeline; in the main process, also the encoded prompts."""
        run, prompts = self.run, self.run.config.samples.validation_prompts
        main = run.accelerator.is_main_process
        if not (main or run.accelerator.process_index < len(prompts) or is_sharded(run.accelerator)):
            return []
        self.pipeline = run.load_encoders(text=main)
        if not main:
            return []
        encoded = run.family.encode_prompts(self.pipeline.to(run.accelerator.device), prompts, self.images)
        drop_text_encoders(self.pipeline.to("cpu"))
        free_memory()
        return encoded

    def __call__(self, step: int, policy: nn.Module) -> None:
        """Draws samples after ``step`` steps. Every process calls it, in evaluation mode and without gradients.

        Once the run has begun to train, a failure here is only a warning: the weights that samples are drawn from are
        as they were. Where the run is asked to stop meanwhile, samples are left out: a launcher gives it seconds to
        write a checkpoint.

        Args:
            step: 0 before training.
            policy: the network, unwrapped, on the run's device.

        Raises:
            Exception: at step 0, where there is nothing to lose yet; where another process is gone.
        """
        accelerator = self.run.accelerator
        try:
            shares = from_all(accelerator, lambda: self._draw(policy))
            on_main(accelerator, lambda: self._write(step, shares))
            return
        except Exception as error:
            if step == 0 or is_collective(error):
                raise
            if accelerator.is_main_process:
                reason = str(error) if isinstance(error, _PLAIN) else f"{type(error).__name__}: {error}"
                message = f"step {step}: no samples, the run continues without them: {' '.join(reason.split())}"
                warnings.warn(message, TrainingWarning, stacklevel=2)
        free_memory()  # it may have been out of it

    def _draw(self, policy: nn.Module) -> dict[int, Any]:
        """Draws this process's samples by number of the prompt: ``[1, 3, H, W]`` uint8, or the bytes of an mp4."""
        run, accelerator = self.run, self.run.accelerator
        data, samples = run.config.data, run.config.samples
        count, rank, world = len(self.prompts), accelerator.process_index, accelerator.num_processes
        height, width = data.sizes[0]
        drawn: dict[int, Any] = {}
        if self.pipeline is None:
            return drawn
        sharded = is_sharded(accelerator)
        # A process that broke off by itself would leave the others waiting for its part of the network.
        parts = [] if sharded else run.family.networks_in(inner_network(policy)).values()
        hooks = [part.register_forward_pre_hook(_break_off) for part in parts]
        self.pipeline.to(accelerator.device)
        try:
            for number in range(rank, -(-count // world) * world, world):
                idle = number >= count
                if idle and not sharded:
                    break
                place = 0 if idle else number
                sample = run.family.sample(
                    self.pipeline,
                    policy,
                    [self.prompts[place]],
                    images=None if self.images is None else [self.images[place]],
                    seed=samples.seed + number,
                    height=height,
                    width=width,
                    frames=data.frames,
                    steps=samples.num_inference_steps,
                    guidance=samples.guidance_scale,
                    autocast=accelerator.autocast,
                )
                if not idle:
                    drawn[number] = sample
        finally:
            self.pipeline.to("cpu")
            for hook in hooks:
                hook.remove()
        return {n: self._as_mp4(sample[0]) for n, sample in drawn.items()} if run.family.video else drawn

    def _as_mp4(self, clip: Tensor) -> bytes:
        """Encodes a clip: far fewer bytes than its pixels, which would otherwise go from process to process."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_video(path, clip, self.run.config.data.fps or SAMPLE_FPS)
            return path.read_bytes()

    def _write(self, step: int, shares: list[dict[int, Any]]) -> None:
        """Writes the samples of all processes, and their prompts."""
        drawn = {number: sample for share in shares for number, sample in share.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_prompts()
        prompts = self.run.config.samples.validation_prompts
        samples = [drawn[number] for number in sorted(drawn)]
        if self.run.family.video:
            paths = [self.folder / f"step-{step:08d}-{number}.mp4" for number in range(len(samples))]
            for path, clip in zip(paths, samples, strict=True):
                write_aside(path, clip)
            log_clips(self.run.accelerator, step, list(zip(prompts, paths, strict=True)))
        else:
            write_image_grid(self.folder / f"step-{step:08d}.png", torch.cat(samples))
            arrays = [sample[0].permute(1, 2, 0).numpy() for sample in samples]
            log_images(self.run.accelerator, step, list(zip(prompts, arrays, strict=True)))

    def _write_prompts(self) -> None:
        path, prompts = self.run.config.training.folder / PROMPTS, self.run.config.samples.validation_prompts
        try:
            former = parse_json(read_text(path), path)
        except (FileNotFoundError, FileError):
            former = None
        if former == prompts:
            return
        if former is not None:  # of a run that was resumed with others
            warnings.warn(
                f"{path}: earlier samples in this folder were drawn from different prompts",
                TrainingWarning,
                stacklevel=2,
            )
        write_aside(path, json.dumps(prompts, ensure_ascii=False, indent=1) + "\n")


class _StoppedError(Exception):
    """The run was asked to stop."""


_PLAIN = (_StoppedError, OtherProcessError)  # whose classes tell a user nothing


def _break_off(module: nn.Module, args: Any) -> None:
    """Raises before a call of the network if the run was asked to stop."""
    if asked_to_stop():
        raise _StoppedError("asked to stop")
