"""Settings of the pairs: the section ``data`` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sipo.data.clips import MAX_PIXELS
from sipo.families.config import Dtype
from sipo.fields import AtLeast0, AtLeast1, Positive, check_fields


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from, and how they are encoded (once, by ``sipo precompute``).

    Attributes:
        dataset_name: JSONL file, folder of parquet files, hub id of a data set, or VideoDPO folder; "toy" for a small
            one.
        format: format of ``dataset_name``; "auto" detects it.
        dataset_split_name: split of a data set that has several.
        streaming: read a hub's data set row by row in place of downloading all of it first.
        cache: folder of latents, text embeddings and reference errors.
        sizes: heights and widths to train at, in pixels; a pair goes to the one nearest in shape.
        frames: frames of each clip; 1 for images.
        fps: frames per second that clips are read at; ``None`` takes each file's own.
        center_crop: cut what exceeds the size from both sides alike; ``False`` cuts at a random place (SDXL is told).
        random_flip: mirror half of the pairs, all images of a pair alike.
        latents: "sample" draws once from the VAE's posterior, "mode" takes its mean.
        enable_tiling: encode and decode in overlapping tiles: less memory, slightly different rounding.
        vae_dtype: type that the VAE encodes and decodes in; in half precision latents are 1 to 2 % off.
        dtype: type that latents and text embeddings are stored in.
        skip_bad: leave out pairs that cannot be used, and say how many; ``False`` stops at the first.
        max_pixels: most pixels that an image or a frame may have. Decoding takes about 8 bytes a pixel.
        max_pairs: use at most this many pairs, the first ones.
        held_out: pairs kept from training, for validation.
        draws: fixed draws (noise level, noise) for each pair; 0 makes new draws at each step, as training scripts do.
        reference_errors: compute the reference's error at each draw beforehand.
        seed: seed of crops, flips, latents and draws.
        shard_pairs: rows of the source whose pairs share one file of the cache.
        num_workers: threads that decode; ``None`` takes one per processor, 8 at most.
        queue_mb: megabytes of decoded pairs in memory at most, at 8 bits a colour and the size they are trained at; of
            large clips two pairs in any case, one of them being encoded.
    """

    dataset_name: str
    cache: str
    format: Literal["auto", "jsonl", "pickapic", "videodpo"] = "auto"
    dataset_split_name: str = "train"
    streaming: bool = False
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(512, 512)])
    frames: AtLeast1 = 1
    fps: Positive | None = None
    center_crop: bool = True
    random_flip: bool = False
    latents: Literal["sample", "mode"] = "sample"
    enable_tiling: bool = False
    vae_dtype: Dtype = "float32"
    dtype: Dtype = "bfloat16"
    skip_bad: bool = False
    max_pixels: AtLeast1 = MAX_PIXELS
    max_pairs: AtLeast1 | None = None
    held_out: AtLeast0 = 0
    draws: AtLeast0 = 0
    reference_errors: bool = False
    seed: int = 0
    shard_pairs: AtLeast1 = 64
    num_workers: AtLeast1 | None = None
    queue_mb: AtLeast1 = 1024

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reference_errors and self.draws < 1:
            raise ValueError(f"draws={self.draws}: expected at least 1, for the reference's errors to belong to")
        if not self.sizes or any(side < 1 for size in self.sizes for side in size):
            raise ValueError(f"sizes={self.sizes}: expected at least one [height, width] in pixels")
