"""Decodes pairs in threads, and cuts them to the size that they are trained at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sipo.cache.source import FileRecord, record_file, side_name
from sipo.data.config import DataConfig
from sipo.data.load import BadPairError, is_cut, load_condition_image, load_error_mask, load_pair
from sipo.data.media import nearest_size, resize_and_crop
from sipo.data.records import PairRecord
from sipo.families.base import Condition, Family
from sipo.seeds import RandomStream, derive_seed

_T = TypeVar("_T")
_R = TypeVar("_R")


class PairPixels(NamedTuple):
    """The pixels of both samples of a pair, ready to be encoded.

    Attributes:
        pixels: uint8, chosen first, of one shape.
        own: what each is told beside its prompt, ``[2, ...]`` by name.
        condition_image: uint8 ``[3, H, W]`` of the samples' size; ``None`` where there is none.
        is_cut: whether the condition image lost much of its area to get the samples' shape.
        error_mask: uint8 ``[H, W]`` of the samples' size; ``None`` where there is none.
    """

    pixels: list[Tensor]
    own: Condition
    condition_image: Tensor | None
    is_cut: bool
    error_mask: Tensor | None


class DecodedPair(NamedTuple):
    """A decoded pair, or why it cannot be used, and its files as they were just before."""

    result: PairPixels | BadPairError
    files: dict[str, FileRecord]


class PairDecoder:
    """Decodes the pairs of a source; threads may share it."""

    def __init__(self, family: Family, settings: DataConfig) -> None:
        self.family = family
        self.settings = settings

    def decode(self, record: PairRecord, prefix: str) -> DecodedPair:
        """Decodes a pair and cuts it to size.

        Args:
            record: the pair.
            prefix: what the names of files leave out (:func:`sipo.cache.source.prefix_of`).
        """
        files = {
            side_name(source, prefix): record_file(source)
            for source in record.sources.values()
            if isinstance(source, Path)
        }
        return DecodedPair(self._decode(record), files)

    def _decode(self, record: PairRecord) -> PairPixels | BadPairError:
        settings = self.settings
        fitter = _PairFitter(settings, record.row)
        try:
            what = {"frames": settings.frames, "fps": settings.fps, "max_pixels": settings.max_pixels}
            media = load_pair(record, **what, transform=fitter)  # type: ignore[arg-type]
            image = load_condition_image(record, max_pixels=settings.max_pixels, transform=fitter)
            mask = load_error_mask(record, media[0], max_pixels=settings.max_pixels, transform=fitter)
        except BadPairError as error:
            return error
        own = [self.family.own_condition(sample.size, fitter.crops[sample.size], fitter.size) for sample in media]
        stacked = {name: torch.stack([own[0][name], own[1][name]]) for name in own[0]}
        pixels = [sample.pixels for sample in media]
        if self.family.video and settings.frames == 1:  # an image is a clip of one frame
            pixels = [sample[None] for sample in pixels]
        if image is None:
            return PairPixels(pixels, stacked, None, False, mask)
        return PairPixels(pixels, stacked, image.pixels, is_cut(image, media[0]), mask)


class _PairFitter:
    """Scales and crops both samples of a pair, frame by frame, to the size nearest in shape to the first sample.

    Condition image and error mask come last and get the same size.

    Attributes:
        size: (height, width) that they are scaled and cropped to.
        crops: (top, left) of the crop, by the size that a sample had.
    """

    def __init__(self, settings: DataConfig, row: int) -> None:
        self.settings = settings
        self.flip = settings.random_flip and derive_seed(settings.seed, RandomStream.FLIP, row) % 2 == 1
        self.seed = derive_seed(settings.seed, RandomStream.CROP, row)
        self.size: tuple[int, int] = (0, 0)
        self.crops: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Scales and crops ``[3, H, W]`` to ``[3, *size]``, both uint8."""
        if not self.crops:
            self.size = nearest_size(pixels.shape[-2], pixels.shape[-1], self.settings.sizes)
        # A new generator for each image: frames of one size are cropped alike, in both samples.
        generator = torch.Generator().manual_seed(self.seed)
        fitted = resize_and_crop(
            pixels, *self.size, center_crop=self.settings.center_crop, flip=self.flip, generator=generator
        )
        self.crops[fitted.original_size] = fitted.crop_top_left
        return fitted.pixels


def queue_length(family: Family, settings: DataConfig, workers: int) -> int:
    """Limits the pairs that are decoded ahead: they and the one being encoded fit into ``queue_mb``, but for one."""
    images = 2 * settings.frames + (family.condition_image != "none")
    pair = (3 * images + 1) * max(height * width for height, width in settings.sizes)  # 1: an error mask
    return max(1, min(2 * workers, settings.queue_mb * 10**6 // pair - 1))


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T | None], depth: int
) -> Generator[tuple[_T, _R] | None, None, None]:
    """Yields ``(item, function(item))`` in order, while ``depth`` further results are computed or waiting.

    ``None`` among the items is passed on at once: it comes before the results of earlier items that are waiting.
    """
    waiting: deque[tuple[_T, Future[_R]]] = deque()

    def first() -> tuple[_T, _R]:  # no variable of the generator holds a result until the next is asked for
        item, future = waiting.popleft()
        return item, future.result()

    try:
        for item in items:
            if item is None:
                yield None
                continue
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > depth:
                yield first()
        while waiting:
            yield first()
    finally:
        for _, future in waiting:
            future.cancel()
