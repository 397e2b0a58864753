"""The trackers of a run: TensorBoard, Weights & Biases and whatever else accelerate knows.

A tracker that fails once it runs does not stop training: it is a warning, and the run's own files have everything.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sipo.files import one_line
from sipo.training.config import TrainingConfig, TrainingWarning

TENSORBOARD = "tensorboard"
"""Name of the tracker, and of the folder of its events in that of the run."""

_LONGEST = 60  # characters of a prompt in a tag of TensorBoard


def check_trackers(config: TrainingConfig) -> list[str]:
    """Returns the names of the trackers to start: those of ``config.report_to`` that are installed.

    Raises:
        ValueError: a tracker that accelerate does not know.
        ImportError: a tracker that is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    names = (config.report_to,) if isinstance(config.report_to, str) else tuple(config.report_to)
    if names in ((), ("none",), ("all",)):
        return available if "all" in names else []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f'report_to={name!r}: expected one of {known}, or "all" or "none" alone')
        if name not in available and name != TENSORBOARD:
            raise ImportError(f"report_to={name!r}: not installed, expected `pip install {name}`")
    return [name for name in names if name in available]


def start_trackers(accelerator: Any, config: TrainingConfig, first_step: int) -> list[Any]:
    """Starts the trackers that a configuration asks for, beside those that the accelerator has; returns them.

    TensorBoard's events go to ``tensorboard/`` in the run's folder. TensorBoard no longer shows earlier ones:
    those after the checkpoint where a run is resumed, and all of them where it starts. Errors as for
    :func:`check_trackers`.

    Args:
        accelerator: the run's.
        config: the run's.
        first_step: the step the run starts after, 0 for a new run.
    """
    names = check_trackers(config)
    running = list(accelerator.trackers)
    wanted = [] if running else list(accelerator.log_with)  # the caller's, not yet started
    wanted += [name for name in names if name not in wanted]
    if not accelerator.logging_dir:
        accelerator.project_configuration.logging_dir = str(config.folder)
    options = {
        # Step 0 has the samples from before training, which a resumed run keeps and one that starts draws again.
        TENSORBOARD: {"purge_step": first_step + 1 if first_step else 0},
        "wandb": {"name": config.folder.name, "dir": str(config.folder)},
    }
    started: list[Any] = []
    for tracker in wanted:
        if str(tracker) in {t.name for t in running}:
            continue
        # init_trackers starts whatever the accelerator holds, running or not: one at a time, then.
        accelerator.log_with, accelerator.trackers = [tracker], []
        accelerator.init_trackers(TENSORBOARD if str(tracker) == TENSORBOARD else "sipo", init_kwargs=options)
        started += accelerator.trackers
    accelerator.log_with, accelerator.trackers = [], running + started
    return started


def finish_trackers(accelerator: Any, started: Sequence[Any]) -> None:
    """Ends what :func:`start_trackers` has started."""
    _each(started, lambda tracker: tracker.finish())
    accelerator.trackers = [tracker for tracker in accelerator.trackers if tracker not in started]


@contextmanager
def running_trackers(accelerator: Any, config: TrainingConfig) -> Iterator[None]:
    """Runs trackers inside the context, for samples before the first step. Errors as :func:`check_trackers`."""
    started = start_trackers(accelerator, config, 0)
    try:
        yield
    finally:
        finish_trackers(accelerator, started)


def log_numbers(accelerator: Any, step: int, values: dict[str, float]) -> None:
    """Logs numbers, by their names, to all trackers."""
    _each(accelerator.trackers, lambda tracker: tracker.log(values, step=step))


def log_images(accelerator: Any, step: int, images: Sequence[tuple[str, Any]]) -> None:
    """Logs samples to the trackers that accelerate can give images to. The main process calls it.

    Args:
        accelerator: the run's.
        step: optimiser steps done, 0 before the first.
        images: prompts and arrays ``[H, W, 3]`` uint8.
    """

    def log(tracker: Any) -> None:
        if tracker.name == TENSORBOARD:
            named = {_tag(number, prompt): image[None] for number, (prompt, image) in enumerate(images)}
            tracker.log_images(named, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            from wandb import Image

            tracker.log({"samples": [Image(image, caption=prompt) for prompt, image in images]}, step=step)
        elif hasattr(tracker, "log_images"):
            alone = tracker.name in ("aim", "clearml")  # these take one image under a name, others a list
            named = {_tag(n, prompt): image if alone else [image] for n, (prompt, image) in enumerate(images)}
            tracker.log_images(named, step=step)

    _each(accelerator.trackers, log)


def log_clips(accelerator: Any, step: int, clips: Sequence[tuple[str, Path]]) -> None:
    """Logs samples that are clips, to TensorBoard as animated GIFs and to wandb as they are. The main process calls it.

    Args:
        accelerator: the run's.
        step: optimiser steps done, 0 before the first.
        clips: prompts and files.
    """

    def log(tracker: Any) -> None:
        if tracker.name == TENSORBOARD:
            for number, (prompt, path) in enumerate(clips):
                _add_gif(tracker.writer, _tag(number, prompt), path, step)
        elif tracker.name == "wandb":
            from wandb import Video

            tracker.log({"samples": [Video(str(path), caption=prompt, format="mp4") for prompt, path in clips]}, step)

    _each(accelerator.trackers, log)


def _tag(number: int, prompt: str) -> str:
    return f"samples/{number} {prompt[:_LONGEST]}".rstrip()


def _add_gif(writer: Any, tag: str, path: Path, step: int) -> None:
    """Adds a clip to TensorBoard, whose own ``add_video`` needs moviepy for the same."""
    import av
    from tensorboard.compat.proto.summary_pb2 import Summary

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        milliseconds = round(1000 / float(stream.average_rate or 1))
        first, *others = [frame.to_image() for frame in container.decode(stream)]
    gif = io.BytesIO()
    first.save(gif, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    image = Summary.Image(height=first.height, width=first.width, colorspace=3, encoded_image_string=gif.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _each(trackers: Sequence[Any], work: Callable[[Any], object]) -> None:
    for tracker in trackers:
        try:
            work(tracker)
        except Exception as error:  # whatever a service or its client may raise
            text = f"tracker {tracker.name!r} failed, the run continues: {type(error).__name__}: {one_line(error)}"
            warnings.warn(text, TrainingWarning, stacklevel=3)
