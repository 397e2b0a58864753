"""What ``benchmarks.training`` trains: a network, its frozen copy, and pairs to train it on, all made on the spot."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.step_network import PLAIN, make_network
from sipo import NoiseSchedule
from sipo.batch import PairBatch, collate, noisy_pairs

if TYPE_CHECKING:  # accelerate comes with it
    from sipo.protocols import Predict

PAIRS = 32
INFERENCE_STEPS = 1000  # the smallest steps: importance ratios near 1, so that few pairs are masked, as in training
LORA_RANK = 4
FAMILY_NEEDS = ("accelerate", "diffusers", "transformers", "av")  # for a family's toy and a cache of its pairs


@dataclass(frozen=True)
class TrainingCase:
    """One network, and one batch.

    Attributes:
        label: which family, and how much of its network.
        family: a name in ``sipo.families``.
        batch_size: pairs in a step.
        network: settings of the network, in place of the toy's.
        pixels: height, width and frames of the toy pairs that go through the toy's VAE and text encoder into a cache;
            ``None`` for random latents in memory, with settings of the network in place of its class's.
        sample: shape of one sample's random latents.
        text: tokens and width of its random text embeddings.
        precision: "no", or "bf16" for autocast and a reference in bfloat16.
    """

    label: str
    family: str
    batch_size: int
    network: Mapping[str, Any] = field(default_factory=dict)
    pixels: tuple[int, int, int] | None = None
    sample: tuple[int, ...] = ()
    text: tuple[int, int] = (0, 0)
    precision: str = "no"


@dataclass
class Setup:
    """A case, ready to train.

    Attributes:
        case: the case.
        network: what the network is.
        base: the network before training, from which policies and references are copied.
        predict: calls it.
        schedule: to train with.
        pairs: items without draws.
        drawn: the same pairs, each with a fixed draw.
        with_errors: ``drawn``, with the reference's errors.
        lora_targets: modules that LoRA adapts; none where the network is not diffusers'.
    """

    case: TrainingCase
    network: str
    base: nn.Module
    predict: Predict
    schedule: NoiseSchedule
    pairs: Any
    drawn: Any
    with_errors: Any
    lora_targets: tuple[str, ...]


def make_setup(case: TrainingCase, device: str, folder: Path) -> Setup:
    """Builds a case.

    Args:
        case: what to build.
        device: "cpu" or "cuda".
        folder: for the toy's files and the cache; must be empty.

    Raises:
        ImportError: a package is missing that the case needs.
    """
    torch.manual_seed(0)
    return _in_memory(case, device) if case.pixels is None else _cached(case, device, folder)


def lora_networks(setup: Setup, device: str) -> tuple[nn.Module, nn.Module]:
    """Returns a policy with adapters on the frozen base, and the frozen base alone.

    Raises:
        ImportError: peft is missing, or diffusers.
    """
    from sipo.families.tuning import prepare_lora

    if not setup.lora_targets:
        raise ImportError("diffusers is not installed, whose networks take adapters")
    policy = copy.deepcopy(setup.base)
    prepare_lora(policy, rank=LORA_RANK, target_modules=setup.lora_targets)
    return policy.to(device), reference_for(setup.base, setup.case)


def reference_for(base: nn.Module, case: TrainingCase) -> nn.Module:
    """Returns a frozen copy, in bfloat16 where the case is."""
    from sipo.families.tuning import frozen_copy

    return frozen_copy(base, torch.bfloat16 if case.precision == "bf16" else None)


def quiet() -> None:
    """Hides the progress bars of a toy's loading and saving."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _cached(case: TrainingCase, device: str, folder: Path) -> Setup:
    """Encodes toy pairs of images or clips with the family's toy pipeline into a cache, with reference errors."""
    missing = [name for name in FAMILY_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)}: not installed, expected for a cache of toy pairs")
    from sipo import families
    from sipo.cache.finished import open_cache
    from sipo.cache.index import pairs_fingerprint
    from sipo.cache.pairs import CachedPairs, DrawnPairs
    from sipo.cache.precompute import precompute_pairs
    from sipo.cache.precompute_errors import precompute_reference_errors
    from sipo.cache.reference_errors import FixedDraws
    from sipo.data.config import DataConfig
    from sipo.data.readers import open_pairs
    from sipo.data.toy import make_toy_pairs
    from sipo.families.config import ModelConfig
    from sipo.families.toy import build_toy

    quiet()
    assert case.pixels is not None
    height, width, frames = case.pixels
    family = families.get_family(case.family)
    size: dict[str, Any] = {"height": height, "width": width, "frames": frames}
    model = build_toy(case.family, folder / "model")
    source = make_toy_pairs(folder / "pairs", video=family.video, pairs=PAIRS, **size)
    data = DataConfig(
        dataset_name=str(source), cache=str(folder / "cache"), sizes=[(height, width)], frames=frames, dtype="float32"
    )
    precompute_pairs(
        open_pairs(source, "jsonl"),
        family,
        lambda: family.load_encoders(model),
        data.cache,
        settings=data,
        fingerprint=pairs_fingerprint(ModelConfig(family=case.family, pretrained_model_name_or_path=str(model)), data),
        progress=None,
    )
    cache, schedule = open_cache(data.cache), family.load_schedule(model, INFERENCE_STEPS)
    network: Any = family.load_network(model)
    base = type(network).from_config({**network.config, **case.network}).to(device)
    reference = reference_for(base, case)
    fixed = FixedDraws(draws=1, seed=0)
    errors = precompute_reference_errors(
        cache,
        reference,
        family.predict,
        schedule,
        fixed,
        {"of": "benchmarks.training"},
        batch_size=case.batch_size,
        progress=None,
    )
    pairs = CachedPairs(cache)
    drawn = DrawnPairs(pairs, schedule, fixed)
    with_errors = DrawnPairs(pairs, schedule, fixed, errors)
    name = f"diffusers {type(base).__name__}"
    return Setup(case, name, base, family.predict, schedule, pairs, drawn, with_errors, family.lora_targets)


def _in_memory(case: TrainingCase, device: str) -> Setup:
    """Makes random latents; the network is diffusers', or a plain transformer if diffusers is not installed."""
    from sipo import families  # needs torch alone until something is loaded

    family = families.get_family(case.family)
    if family.schedule_kind == "discrete":
        schedule = NoiseSchedule.discrete(num_inference_steps=INFERENCE_STEPS)
    else:
        schedule = NoiseSchedule.flow(shift=3.0, num_inference_steps=INFERENCE_STEPS)
    predict: Predict = family.predict
    targets = family.lora_targets
    base: nn.Module
    if importlib.util.find_spec("diffusers") is None:
        base, predict, targets, name = _plain(case, device), _predict_plain, (), PLAIN
    else:
        import diffusers

        base = getattr(diffusers, family.network_class)(**case.network).to(device)
        name = f"diffusers {family.network_class}"
    pairs, drawn, with_errors = [], [], []
    reference = reference_for(base, case)
    for _ in range(PAIRS):
        chosen, rejected, noise = torch.randn(3, *case.sample)
        condition = {"prompt_embeds": torch.randn(case.text)}
        pairs.append({"chosen": chosen, "rejected": rejected, "condition": condition})
        drawn.append({**pairs[-1], "noise": noise, "level": schedule.sample_levels(1)[0]})
        error = _reference_error(drawn[-1], reference, predict, schedule, device, case.precision)
        with_errors.append({**drawn[-1], "ref_error": error})
    return Setup(case, name, base, predict, schedule, pairs, drawn, with_errors, targets)


@torch.no_grad()
def _reference_error(
    item: Any, network: nn.Module, predict: Predict, schedule: NoiseSchedule, device: str, precision: str
) -> Tensor:
    """``[2]`` float64 on the CPU: chosen sample's and rejected sample's mean squared error at the item's draw."""
    pairs = noisy_pairs(PairBatch.of_items(collate([item])).to(torch.device(device)), schedule)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        prediction = predict(network, pairs.samples, pairs.timesteps, pairs.condition)
    return (prediction.double() - pairs.target.double()).square().flatten(1).mean(1).cpu()


def _plain(case: TrainingCase, device: str) -> nn.Module:
    """Returns ``benchmarks.step``'s plain transformer, about as wide and as deep as the case's network."""
    channels, *_ = case.sample
    tokens, width = case.text
    size = SimpleNamespace(
        sample=(channels,), heads=max(1, width // 64), head_dim=min(width, 64), feed_forward=4 * width, layers=2,
        text_tokens=tokens,
    )  # fmt: skip
    return make_network(size, device, torch.float32)[0]  # type: ignore[arg-type] # all that it reads of a case


def _predict_plain(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    frames = noisy if noisy.ndim == 5 else noisy.unsqueeze(2)
    prediction: Tensor = module(frames, timesteps, condition["prompt_embeds"].to(noisy.dtype))
    return prediction.view_as(noisy)
