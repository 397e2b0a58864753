"""Moving digits: short clips of the demo's real digits, two small video models of them, and what is measured.

A clip is one scanned digit on a canvas of 12x12 pixels, in 5 frames: it moves with constant velocity and is shaken on
the way, some hardly and some much, so that there is smooth and jerky motion to prefer between. The models are
diffusers' own classes, small: "cogvideox" predicts v on CogVideoX's schedule, "wan" is a rectified flow. Both are
called through the adapters that ``sipo train`` uses. ``train_moving_digits.py`` made their weights.

Clips have one channel, so that both layouts hold the same numbers in the same order, and everything here that looks at
clips takes either of them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sipo.demo.digits import CLASSES, IMAGE_SIZE, Digits, load_digits
from sipo.families import FAMILIES
from sipo.families.network import PROMPT
from sipo.protocols import Predict

KINDS = ("cogvideox", "wan")
"""The two models, named as their families are."""

FRAMES = 5
CANVAS = 12
"""Height and width of a frame, in pixels."""

CLIP_SHAPE = {"cogvideox": (FRAMES, 1, CANVAS, CANVAS), "wan": (1, FRAMES, CANVAS, CANVAS)}
"""Shape of one clip as each model takes it: frames before channels, or after."""

BASE = Path(__file__).parent / "base"
"""The shipped models, one folder each."""

SAMPLING_STEPS = 20

BLANK_SMOOTHNESS = -8.0
"""What :func:`smoothness` gives to a clip without a digit to follow; 3 in 100 real clips are worse."""

_MOTIONS = 3  # clips made of each digit
_JITTER = 0.8  # largest deviation of a position from the even way, in pixels
_TOKENS, _TEXT_WIDTH = 2, 32
_SHAPES = 16  # principal components of a digit's looks, 94 % of their variance
_LEAST_INK = 2.0  # in fully inked pixels; the faintest real digit has 11


# ---------------------------------------------------------------- data


@functools.cache
def load_moving(kind: str) -> tuple[Digits, Digits]:
    """Loads the clips to learn from (4,311) and those held out (1,080), three of each digit: always the same.

    Their ``images`` are ``[N, *CLIP_SHAPE[kind]]``. The held-out clips are of the digits that the demo holds out, with
    motions of their own.

    Raises:
        ValueError: a kind that is not known.
    """
    shape = CLIP_SHAPE[_checked(kind)]
    train, held_out = load_digits()
    return _moving(train, shape, seed=0), _moving(held_out, shape, seed=1)


def _moving(digits: Digits, shape: tuple[int, ...], seed: int) -> Digits:
    images, labels = digits.images.squeeze(1).repeat(_MOTIONS, 1, 1), digits.labels.repeat(_MOTIONS)
    clips = render(images, random_paths(len(labels), torch.Generator().manual_seed(seed)))
    return Digits(clips.reshape(-1, *shape), labels)


def random_paths(count: int, generator: torch.Generator) -> Tensor:
    """Returns where digits are, frame by frame: an even way, and jitter on it.

    Each component of the velocity is uniform in [-1, 1] pixels per frame, and the start uniform where the whole way
    stays on the canvas. The jitter of a clip's positions is normal, of a deviation 0.8·u² pixels with u uniform in
    [0, 1]: most clips are rather smooth, and no two equally so. The canvas's border holds a digit back.

    Returns:
        ``[count, FRAMES, 2]`` float32: rows and columns above and left of the digit's image, in [0, 4].
    """
    room = float(CANVAS - IMAGE_SIZE)
    velocity = torch.rand(count, 1, 2, generator=generator) * 2.0 - 1.0
    way = velocity * (FRAMES - 1)
    start = (-way).clamp(min=0.0) + torch.rand(count, 1, 2, generator=generator) * (room - way.abs())
    paths = start + velocity * torch.arange(FRAMES).reshape(1, FRAMES, 1)
    deviation = _JITTER * torch.rand(count, 1, 1, generator=generator).square()
    return (paths + deviation * torch.randn(count, FRAMES, 2, generator=generator)).clamp(0.0, room)


def render(images: Tensor, paths: Tensor) -> Tensor:
    """Draws images ``[N, 8, 8]`` in [-1, 1] at ``paths`` ``[N, F, 2]``, in between pixels bilinearly.

    On the canvas, that keeps the ink and moves the centre of mass exactly as far as the path says.

    Returns:
        ``[N, F, 12, 12]`` in [-1, 1], -1 around the digit.
    """
    return _shift((images[:, None] + 1.0) / 2.0, paths, CANVAS) * 2.0 - 1.0


def _shift(frames: Tensor, offset: Tensor, size: int) -> Tensor:
    """Moves ink ``[N, F or 1, H, W]`` on an empty canvas of ``size`` by ``offset`` ``[N, F, 2]`` rows and columns."""

    def hat(length: int, shift: Tensor) -> Tensor:  # [N, F, size, length]: how much of each pixel falls on which
        distance = torch.arange(size)[:, None] - torch.arange(length)[None, :] - shift[..., None, None]
        return (1.0 - distance.abs()).clamp(min=0.0)

    rows, columns = hat(frames.shape[-2], offset[..., 0]), hat(frames.shape[-1], offset[..., 1])
    return rows @ frames @ columns.transpose(-1, -2)


# ---------------------------------------------------------------- rewards


def ink(clips: Tensor) -> Tensor:
    """Returns the mean pixel of each clip of either layout, ``[N]``: -1 is blank paper, about -0.73 a real clip."""
    return clips.flatten(1).mean(dim=1)


def smoothness(clips: Tensor) -> Tensor:
    """Returns how evenly the digit moves: minus the mean squared second difference of its centre of mass.

    In pixels² per frame⁴: 0 is a constant velocity (also none), below -1 plainly jerky. The mass is each frame's ink,
    ``(pixel + 1) / 2``. A clip with a frame of less than two full pixels of it has no digit to follow and gets
    :data:`BLANK_SMOOTHNESS`, which keeps a policy from being smooth by drawing nothing.

    Args:
        clips: ``[N, ...]`` of either layout, in [-1, 1].

    Returns:
        ``[N]`` float32, at most 0.
    """
    centre, blank = _centres(clips)
    score = -centre.diff(n=2, dim=1).square().sum(dim=-1).mean(dim=1)
    return torch.where(blank.any(dim=1), BLANK_SMOOTHNESS, score)


def _frames(clips: Tensor) -> Tensor:
    """Returns ink ``[N, F, 12, 12]`` in [0, 1] of clips of either layout."""
    if list(clips.shape[1:]) not in [list(shape) for shape in CLIP_SHAPE.values()]:
        expected = " or ".join(str(["N", *shape]).replace("'", "") for shape in CLIP_SHAPE.values())
        raise ValueError(f"clips have shape {list(clips.shape)}: expected {expected}")
    return ((clips.detach().float().cpu().reshape(-1, FRAMES, CANVAS, CANVAS) + 1.0) / 2.0).clamp(0.0, 1.0)


def _centres(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of mass ``[N, F, 2]`` (rows and columns; the canvas's centre where blank), and which frames are blank."""
    frames = _frames(clips)
    place = torch.arange(CANVAS, dtype=torch.float32)
    total = frames.sum(dim=(-2, -1))
    weighted = torch.stack([(frames.sum(dim=-1) * place).sum(dim=-1), (frames.sum(dim=-2) * place).sum(dim=-1)], -1)
    blank = total < _LEAST_INK
    centre = weighted / total.clamp(min=_LEAST_INK)[..., None]
    return torch.where(blank[..., None], (CANVAS - 1) / 2.0, centre), blank


# ---------------------------------------------------------------- models


def build_model(kind: str) -> Any:
    """Builds an untrained network: 3 blocks of width 96, patches of 4x4 pixels, that is 9 tokens a frame."""
    import diffusers

    shared = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 3, "in_channels": 1, "out_channels": 1}
    if _checked(kind) == "wan":
        return diffusers.WanTransformer3DModel(
            **shared, patch_size=(1, 4, 4), text_dim=_TEXT_WIDTH, freq_dim=64, ffn_dim=384, rope_max_seq_len=16
        )
    return diffusers.CogVideoXTransformer3DModel(
        **shared,
        patch_size=4,
        text_embed_dim=_TEXT_WIDTH,
        max_text_seq_length=_TOKENS,
        time_embed_dim=64,
        sample_height=CANVAS,
        sample_width=CANVAS,
        sample_frames=4 * (FRAMES - 1) + 1,  # counted before a VAE that there is not
        spatial_interpolation_scale=1.0,
    )


def build_scheduler(kind: str) -> Any:
    """Builds CogVideoX 2B's schedule (v-prediction, SNR divided by 3, none at the end), or a flow shifted by 3."""
    import diffusers

    if _checked(kind) == "wan":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


def load_base(kind: str) -> tuple[Any, Any]:
    """Loads the shipped network (float32, evaluation mode) and its diffusers scheduler.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a kind that is not known.
    """
    folder = BASE / _checked(kind)
    if not (folder / "config.json").is_file():
        command = f"python -m benchmarks.alignment.train_moving_digits {kind}"
        raise FileNotFoundError(f"{folder}: no base model, expected config.json as {command} writes")
    import diffusers

    network_class = getattr(diffusers, FAMILIES[kind].network_class)
    network = network_class.from_pretrained(
        folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return network.eval(), build_scheduler(kind)


def predict(kind: str) -> Predict:
    """Calls a network of this kind, as the loop does; ``condition`` holds digits ``[N]``."""
    family = FAMILIES[_checked(kind)]

    def call(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        return family.predict(module, noisy, timesteps, {PROMPT: _prompts(condition.device)[condition]})

    return call


@functools.cache
def _prompts(device: torch.device) -> Tensor:
    """``[10, 2, 32]``: what stands for the text "0" to "9"; 20 rows of a Hadamard matrix, orthogonal to each other."""
    matrix = torch.ones(1, 1)
    while len(matrix) < _TEXT_WIDTH:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix[1 : 1 + CLASSES * _TOKENS].reshape(CLASSES, _TOKENS, _TEXT_WIDTH).to(device)


@torch.no_grad()
def sample(model: Any, scheduler: Any, classes: Tensor, seed: int, steps: int = SAMPLING_STEPS) -> Tensor:
    """Draws one clip per entry of ``classes`` ``[N]``: DDIM for "cogvideox", Euler for "wan", without guidance.

    Args:
        model: in evaluation mode; its class says which kind it is.
        scheduler: of :func:`build_scheduler` or :func:`load_base`; not changed.
        classes: digits to draw.
        seed: of the initial noise, the only randomness: two models given one seed start from the same noise.
        steps: of the sampler.

    Returns:
        ``[N, *CLIP_SHAPE[kind]]`` float32 on the CPU, clamped to [-1, 1].
    """
    kind = next(kind for kind in KINDS if FAMILIES[kind].network_class == type(model).__name__)
    call = predict(kind)
    sampler = type(scheduler).from_config(scheduler.config)
    if FAMILIES[kind].schedule_kind == "discrete":
        sampler.set_timesteps(steps)
    else:  # left to itself, the scheduler shifts its grid twice; this is the grid of docs/math.md §3
        sampler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)])
    clips = torch.randn(len(classes), *CLIP_SHAPE[kind], generator=torch.Generator().manual_seed(seed)).to(model.device)
    classes = classes.to(model.device)
    for timestep in sampler.timesteps:
        timesteps = timestep.expand(len(classes)).to(model.device)
        clips = sampler.step(call(model, clips, timesteps, classes), timestep, clips, return_dict=False)[0]
    return clips.clamp(-1.0, 1.0).cpu()


def _checked(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    return kind


# ---------------------------------------------------------------- judge


class ClipJudge:
    """Reads the digit that a clip shows, and gives the features in which distances between sets are measured.

    What it reads is the frames' mean after each was moved so that its centre of mass is the canvas's centre.

    Args:
        train: to fit on.
        held_out: to state its own accuracy on.

    Attributes:
        accuracy: share of the held-out clips that it reads rightly.
    """

    def __init__(self, train: Digits, held_out: Digits) -> None:
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self._classifier = SVC(C=10.0, gamma="scale").fit(_aligned(train.images).numpy(), train.labels.numpy())
        self._shapes = PCA(_SHAPES, whiten=True, svd_solver="full").fit(_aligned(train.images).double().numpy())
        self._ways = PCA(whiten=True, svd_solver="full").fit(_ways(train.images))
        self.accuracy = (self.read(held_out.images) == held_out.labels).double().mean().item()

    def read(self, clips: Tensor) -> Tensor:
        """Returns the digits ``[N]`` int64 that clips of either layout show."""
        return torch.from_numpy(self._classifier.predict(_aligned(clips).numpy()))

    def features(self, clips: Tensor) -> Any:
        """Looks and motion of clips of either layout, NumPy ``[N, 26]`` float64 of variance 1 over the real clips.

        The first 16 principal components of what :meth:`read` reads, and all 10 of the way that the digit takes (its
        centre of mass in 5 frames). In pixels alone, where a digit is would drown how it moves.
        """
        shapes = self._shapes.transform(_aligned(clips).double().numpy())
        return np.concatenate([shapes, self._ways.transform(_ways(clips))], axis=1)


def _ways(clips: Tensor) -> Any:
    """Returns ``[N, 10]`` float64 as NumPy has it: the centres of mass of a clip's frames."""
    return _centres(clips)[0].flatten(1).double().numpy()


def _aligned(clips: Tensor) -> Tensor:
    """Returns ``[N, 144]``: the digit that the frames of a clip agree on, in the middle of the canvas."""
    offset = (CANVAS - 1) / 2.0 - _centres(clips)[0]
    return _shift(_frames(clips), offset, CANVAS).mean(dim=1).flatten(1)
