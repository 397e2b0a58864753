"""The samples of a run for its page: each beside its prompt, at the first step and at the last."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

from sipo.analysis.page import Picture, image, side_by_side, video
from sipo.files import FileError, parse_json, read_bytes, read_text
from sipo.training.log_reader import LogWarning
from sipo.training.sums import PROMPTS

_WHOLE = -1  # in place of a prompt's number


def sample_pictures(folder: Path, settings: dict[str, Any]) -> tuple[str, list[Picture]]:
    """Returns pictures of the first and the last samples of a run by prompt, and the demo's picture."""
    pictures: list[Picture] = []
    prompts = _prompts(folder, settings)
    by_step = _samples_by_step(folder / "samples", len(prompts), settings.get("data.sizes"))
    for number, prompt in enumerate(prompts):
        cells = [(samples[number], f"step {step:,}") for step, samples in by_step.items() if number in samples]
        if cells:
            pictures.append(Picture(prompt or "(an empty prompt)", side_by_side(cells), kind="sample"))
    remark = "Each prompt with the same noise at both steps." if pictures else ""
    for step, samples in by_step.items():
        if _WHOLE in samples:
            pictures.append(Picture(f"Step {step:,}", samples[_WHOLE], "Which prompts these are of is not known."))
    path = folder / "demo.png"
    if path.is_file():
        content = image(path.read_bytes(), "the demo's picture")
        pictures.append(Picture("The demo", content, "Samples before and after, and what was measured."))
    return remark, pictures


def _prompts(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the prompts in the order of the samples, from the configuration if they are not stored beside them."""
    path = folder / PROMPTS
    prompts = settings.get("samples.validation_prompts")
    try:
        prompts = parse_json(read_text(path), path)
    except FileNotFoundError:
        pass
    except FileError as error:
        warnings.warn(f"{error}; the configuration's samples.validation_prompts are shown", LogWarning, stacklevel=2)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        return []
    return prompts


def _samples_by_step(folder: Path, count: int, sizes: Any) -> dict[int, dict[int, str]]:
    """Returns the first and the last samples for a page, by step and number of the prompt.

    A damaged file is warned of and left out. An image that is not one of ``count`` samples of the first of
    ``sizes`` is shown whole.
    """
    from PIL import Image

    files: dict[int, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("step-*")):
        if named := re.fullmatch(r"step-(\d{1,12})(?:-(\d{1,6})\.mp4|\.png)", path.name):
            files.setdefault(int(named[1]), []).append((int(named[2] or 0), path))
    steps = sorted(files)
    found: dict[int, dict[int, str]] = {}
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        name, found[step] = f"sample at step {step:,}", {}
        for number, path in files[step]:
            try:
                data = read_bytes(path)
                if path.suffix == ".mp4":
                    found[step][number] = video(data, name)
                else:
                    found[step] |= {i: image(cell, name) for i, cell in _cells(path, data, count, sizes)}
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
                warnings.warn(f"{path}: samples left out ({error})", LogWarning, stacklevel=2)
    return found


def _cells(path: Path, data: bytes, count: int, sizes: Any) -> list[tuple[int, bytes]]:
    """Splits an image grid into its samples, each as a PNG, by number of the prompt; any other image stays whole.

    Raises:
        OSError, ValueError, SyntaxError: it is not readable.
    """
    from PIL import Image

    from sipo.data.media import split_image_grid

    try:
        height, width = map(int, sizes[0])
        cells = split_image_grid(path, count, height, width)
    except (ValueError, TypeError, LookupError):  # of other prompts; no sizes, or none that can be
        with Image.open(path) as whole:
            whole.load()
        return [(_WHOLE, data)]
    return [(number, _png(cell)) for number, cell in enumerate(cells)]


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
