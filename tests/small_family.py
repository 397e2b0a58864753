"""A family without diffusers, for tests of the cache: a linear VAE, text embeddings from hashes, a small network."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn

from sipo import NoiseSchedule
from sipo.cache.finished import open_cache
from sipo.cache.index import pairs_fingerprint
from sipo.cache.pairs import CachedPairs
from sipo.cache.precompute import CacheSummary, precompute_pairs
from sipo.cache.precompute_errors import precompute_reference_errors
from sipo.cache.reference_errors import FixedDraws, ReferenceErrors
from sipo.cache.savings import Cost
from sipo.data.config import DataConfig
from sipo.data.records import PairRecord
from sipo.families.base import Family
from sipo.families.config import ModelConfig
from sipo.families.network import Condition
from sipo.families.vae import as_floats

TOKENS, WIDTH = 8, 4
MODEL = ModelConfig(family="small", pretrained_model_name_or_path="nowhere")


@dataclass
class Pipeline:
    """Counts what it is asked for; fails at the n-th pair, where ``fail_at`` is set."""

    fail_at: int | None = None
    encoded: int = 0
    prompts: list[str] = field(default_factory=list)


class SmallFamily(Family):
    """Latents are 8x8 means; text is as many tokens as words, then zeros."""

    name = "small"
    pipeline_class = network_class = network = "none"

    def encode_text(
        self, pipeline: Any, prompts: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> list[Condition]:
        pipeline.prompts += prompts
        return [self._embed(prompt) for prompt in prompts]

    def encode_unconditional(self, pipeline: Any) -> Condition:
        return self._embed("")

    def _embed(self, prompt: str) -> Condition:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
        numbers = torch.randn(TOKENS + 1, WIDTH, generator=torch.Generator().manual_seed(seed))
        numbers[min(TOKENS, 1 + len(prompt.split())) : TOKENS] = 0.0
        return {"prompt_embeds": numbers[:TOKENS].clone(), "pooled": numbers[TOKENS].clone()}

    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        pipeline.encoded += 1
        if pipeline.encoded == pipeline.fail_at:
            raise KeyboardInterrupt
        means = torch.nn.functional.avg_pool2d(as_floats(pixels), 8)
        if generator is not None:
            means = means + 0.1 * torch.randn(means.shape, generator=generator)
        return means

    def latent_shape(self, pipeline: Any, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return 3, height // 8, width // 8

    def own_condition(
        self, original_size: tuple[int, int], crop_top_left: tuple[int, int], size: tuple[int, int]
    ) -> Condition:
        return {"time_ids": torch.tensor([*original_size, *crop_top_left, *size], dtype=torch.float32)}

    def check_size(self, height: int, width: int, frames: int) -> None:
        if height % 8 or width % 8:
            raise ValueError(f"height={height}, width={width}: expected multiples of 8")

    def predict(
        self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any, *, guidance: float | None = None
    ) -> Tensor:
        dtype = next(module.parameters()).dtype
        out: Tensor = module(noisy.to(dtype), timesteps, {k: v.to(dtype) for k, v in condition.items()})
        return out

    def network_inputs(self, *args: Any) -> dict[str, Any]:
        raise NotImplementedError

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class RaggedFamily(SmallFamily):
    """The same without the zeros: as many tokens as words and one more, of which the last is all zeros, and a mask."""

    def _embed(self, prompt: str) -> Condition:
        whole, length = super()._embed(prompt), min(TOKENS, 1 + len(prompt.split()))
        whole["prompt_embeds"][length - 1] = 0.0
        return whole | {
            "prompt_embeds": whole["prompt_embeds"][:length],
            "prompt_embeds_mask": torch.ones(length, dtype=torch.bool),
        }


class EditFamily(SmallFamily):
    """Edits of an image, which the network sees as the mean of 8x8 pixels."""

    name = "edit"
    condition_image = "required"

    def encode_condition_image(self, pipeline: Any, pixels: Tensor) -> list[Condition]:
        return [{"condition_latents": means} for means in SmallFamily.encode_pixels(self, Pipeline(), pixels)]


class OptionalEditFamily(EditFamily):
    name = "optional-edit"
    condition_image = "optional"


class SeeingFamily(EditFamily, RaggedFamily):
    """Edits whose text starts with a token of the image's mean colour."""

    name = "seeing"
    text_sees_image = True

    def encode_text(
        self, pipeline: Any, prompts: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> list[Condition]:
        assert images is not None and all(image.dtype == torch.uint8 for image in images)
        conditions = super().encode_text(pipeline, prompts)
        for condition, image in zip(conditions, images, strict=True):
            seen = torch.cat([image.double().mean((1, 2)).float(), torch.ones(1)])[None] / 255
            condition["prompt_embeds"] = torch.cat([seen, condition["prompt_embeds"]])
            condition["prompt_embeds_mask"] = torch.ones(len(condition["prompt_embeds"]), dtype=torch.bool)
        return conditions


class Network(nn.Module):
    """Sees latents, timesteps, text, each image's own condition and the condition image."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inward = nn.Conv2d(3, 6, 3, padding=1)
            self.text = nn.Linear(2 * WIDTH, 6)
            self.own = nn.Linear(6, 6)
            self.outward = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        tokens, mask = condition["prompt_embeds"], condition.get("prompt_embeds_mask")
        mean = tokens.mean(1) if mask is None else (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        text = torch.cat([mean, condition["pooled"]], dim=1)
        shift = self.text(text) + self.own(condition["time_ids"] / 64) + (timesteps / 1000)[:, None].to(noisy.dtype)
        if "condition_latents" in condition:
            noisy = noisy + condition["condition_latents"]
        out: Tensor = self.outward(torch.nn.functional.silu(self.inward(noisy) + shift[:, :, None, None]))
        return out


def png(seed: int, height: int = 20, width: int = 24) -> bytes:
    """A random image's file."""
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@dataclass
class Records:
    """A reader of records in memory: every prompt three times, two shapes of images if asked for.

    Rows in ``edits`` have a condition image, of another shape.
    """

    records: list[PairRecord]

    def __iter__(self) -> Iterator[PairRecord]:
        return iter(self.records)

    @classmethod
    def make(cls, count: int = 12, two_sizes: bool = False, edits: Sequence[int] = ()) -> Records:
        def image(seed: int, row: int) -> bytes:
            return png(seed, 36, 20) if two_sizes and row % 4 == 1 else png(seed)

        return cls(
            [
                PairRecord(
                    row,
                    "a b c d"[: 1 + 2 * (row // 3)],
                    image(2 * row, row),
                    image(2 * row + 1, row),
                    condition_image=png(1000 + row, 40, 31) if row in edits else None,
                )
                for row in range(count)
            ]
        )


def settings(**changes: Any) -> DataConfig:
    """Sizes 16x24 and 24x16, four pairs to a shard."""
    default: dict[str, Any] = {
        "dataset_name": "nowhere",
        "cache": "unused",
        "sizes": [(16, 24), (24, 16)],
        "dtype": "float32",
        "shard_pairs": 4,
        "seed": 5,
        "num_workers": 2,
    }
    return DataConfig(**default | changes)


def build(
    folder: Path,
    reader: Any = None,
    pipeline: Pipeline | None = None,
    accelerator: Any = None,
    family: Family | None = None,
    **changes: Any,
) -> CacheSummary:
    """Runs :func:`precompute_pairs`; some of the changes are its own arguments."""
    names = ("check_hashes", "verify", "refuse_changes", "on_cost")
    own = {name: changes.pop(name) for name in names if name in changes}
    pipeline, encoded = pipeline or Pipeline(), settings(**changes)
    return precompute_pairs(
        Records.make() if reader is None else reader,
        family or SmallFamily(),
        lambda: pipeline,
        folder,
        **own,
        settings=encoded,
        fingerprint=pairs_fingerprint(MODEL, encoded),
        accelerator=accelerator,
        progress=False,
    )


@dataclass
class Accelerator:
    """What is used of accelerate's, for one of several threads that act as processes."""

    process_index: int
    num_processes: int
    barrier: threading.Barrier
    values: list[Any]

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        self.barrier.wait(60)

    def gather_object(self, value: list[Any]) -> list[Any]:
        """As accelerate.utils has it."""
        self.values[self.process_index] = value[0]
        self.wait_for_everyone()
        found = list(self.values)
        self.wait_for_everyone()
        return found

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


def outcomes_in_processes(count: int, function: Callable[[Accelerator], Any]) -> list[Any]:
    """Calls a function in several threads at once, as several processes of a run would.

    Returns:
        What each returned, or the error that it raised.
    """
    barrier, values, me = threading.Barrier(count), [None] * count, threading.local()
    results: list[Any] = [None] * count

    def call(rank: int) -> None:
        me.accelerator = Accelerator(rank, count, barrier, values)
        try:
            results[rank] = function(me.accelerator)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(count)]
    with mock.patch("accelerate.utils.gather_object", lambda value: me.accelerator.gather_object(value)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def in_processes(count: int, function: Callable[[Accelerator], Any]) -> list[Any]:
    """The same, where all are to succeed; else raises the first error."""
    results = outcomes_in_processes(count, function)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


DISCRETE = NoiseSchedule.discrete(num_inference_steps=50)
FLOW = NoiseSchedule.flow(shift=3.0)
REFERENCE = {"path": "nowhere", "revision": None, "dtype": "float32"}


def pairs_in(folder: Path, two_sizes: bool = False, **changes: Any) -> CachedPairs:
    build(folder, Records.make(two_sizes=two_sizes), **changes)
    return CachedPairs(open_cache(folder))


def ragged_pairs_in(folder: Path) -> CachedPairs:
    costs: list[Cost] = []
    build(folder, family=RaggedFamily(), on_cost=costs.append)
    assert costs[0].prompt_bytes == 4 * (512 * 4 + 512 + 4)
    return CachedPairs(open_cache(folder))


def arguments(reference: dict[str, Any] = REFERENCE, **changes: Any) -> dict[str, Any]:
    return {"fixed": FixedDraws(**{"draws": 3, "seed": 2, "proportion_empty_prompts": 0.3} | changes)} | {
        "reference": reference
    }


def reference_errors(cached: CachedPairs, schedule: NoiseSchedule = DISCRETE, **changes: Any) -> ReferenceErrors:
    options: dict[str, Any] = {"batch_size": 5, "progress": False}
    names = ("network", "predict", *options, "accelerator", "num_workers")
    given = {name: changes.pop(name) for name in names if name in changes}
    network, predict = given.pop("network", Network()), given.pop("predict", SmallFamily().predict)
    return precompute_reference_errors(
        cached.cache, network, predict, schedule, **arguments(**changes), **options | given
    )
