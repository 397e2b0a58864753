"""Calculates what a cache costs and saves: for a run, for published models at full size, or for any other numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

_ERROR_BYTES = 2 * 8 + 8  # of a draw: two float64 errors and a noise level


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that its savings follow from.

    Attributes:
        parameters: of the network that is trained.
        latents: shape of one image's or clip's latents.
        text: shapes of one prompt's embeddings.
        pixels: what the latents are of, for people.
    """

    parameters: int
    latents: tuple[int, ...]
    text: tuple[tuple[int, ...], ...]
    pixels: str


FULL_SIZE = {
    "SD1.5": ModelSize(859_520_964, (4, 64, 64), ((77, 768),), "512x512"),
    "SDXL": ModelSize(2_567_463_684, (4, 128, 128), ((77, 2048), (1280,)), "1024x1024"),
    "CogVideoX-2B": ModelSize(1_693_783_872, (13, 16, 60, 90), ((226, 4096),), "49 frames of 480x720"),
    "CogVideoX-5B": ModelSize(5_570_283_072, (13, 16, 60, 90), ((226, 4096),), "49 frames of 480x720"),
    "Wan 2.1 1.3B": ModelSize(1_418_996_800, (16, 21, 60, 104), ((512, 4096),), "81 frames of 480x832"),
}
"""The families as published; parameters counted from the published configurations."""


@dataclass(frozen=True)
class Cost:
    """What encoding a cache will cost, before any of it is encoded.

    Attributes:
        pairs: to be encoded; ``None`` where the source does not say how many it has.
        encoded: pairs that are encoded already.
        prompts: whose text is to be encoded, at most.
        exact: whether the source's rows have been read; else ties and faulty rows count as pairs.
        pair_bytes: bytes of both samples' latents, at the largest size and at the smallest.
        prompt_bytes: of one prompt's embeddings, at most: what pads them is not stored.
        images: images or clips that are encoded for each pair, at most: both samples, and the condition image.
    """

    pairs: int | None
    encoded: int
    prompts: int
    exact: bool
    pair_bytes: tuple[int, int]
    prompt_bytes: int
    images: int = 2

    def check(self, free: int) -> None:
        """Refuses latents that do not fit on the disk, even without the text.

        Args:
            free: bytes.

        Raises:
            ValueError: with both numbers.
        """
        needed = (self.pairs or 0) * self.pair_bytes[1]
        if self.exact and needed > free:
            take, left = _size(needed), _size(free)
            if take == left:  # rounded
                take, left = f"{needed} B", f"{free} B"
            raise ValueError(
                f"latents of {self.pairs} pairs take {take}, {left} are free: not enough disk space; use another "
                "data.cache, or fewer pairs (data.max_pairs)"
            )

    def describe(self, free: int, draws: int = 0) -> str:
        """Formats the cost in one line.

        Args:
            free: bytes.
            draws: of each pair whose reference errors are computed.
        """
        most = "" if self.exact else "at most "
        number = 1 if self.pairs is None else self.pairs
        what = f"{most}{number} pair{'s' * (number != 1)}"
        if self.pairs is None:
            what = "each pair (the source does not say how many)"
        # Of a family that takes condition images, not every pair need have one.
        passes = [
            f"{most if self.images == 2 else 'at most '}{self.images * number} passes of the VAE",
            f"at most {self.prompts} of the text encoders",
        ]
        if draws:
            passes.append(f"{most}{2 * number * draws} of the reference")
        return (
            f"to encode {what}: {most or 'about '}{_size(number * self.pair_bytes[0])} of latents and at most "
            f"{_size(self.prompts * self.prompt_bytes)} of text on disk, {_size(free)} free; {', '.join(passes)}"
        )

    def unused(self, *, draws: int, held_out: int, seen: int) -> str:
        """Returns what the run will not use, and the key that leaves it out; empty if it uses everything.

        Args:
            draws: of each pair whose reference errors are computed; 0 for none.
            held_out: pairs kept from training.
            seen: pairs that training sees, repetitions counted.
        """
        if self.pairs is None:
            return ""
        pairs = self.pairs + self.encoded - held_out
        if seen < pairs:
            kept = " and the held-out ones" if held_out else ""
            return (
                f"training uses only {seen} of the {pairs} pairs; data.max_pairs={seen + held_out} "
                f"would encode just those{kept}"
            )
        if pairs > 0 and draws > (enough := -(-seen // pairs)):
            return (
                f"training uses only {seen} of the {pairs * draws} draws; data.draws={enough} would compute just those"
            )
        return ""


def _size(number: int) -> str:
    """Formats bytes in the unit that leaves three digits."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


@dataclass(frozen=True)
class Savings:
    """What a cache costs, and what training no longer needs. Bytes, and passes of one sample.

    Attributes:
        reference_bytes: the reference's weights, on the device for as long as training lasts.
        error_bytes: on disk instead of them.
        latent_bytes: on disk.
        text_bytes: on disk at most, were every prompt another and of full length.
        reference_passes_spent: forward passes of the reference beforehand.
        reference_passes_saved: forward passes that training would have made.
        encoder_passes_saved: images or clips that the VAE would have encoded again.
        step_share: the reference's part of a training step's passes, a backward pass counted as two.
    """

    reference_bytes: int
    error_bytes: int
    latent_bytes: int
    text_bytes: int
    reference_passes_spent: int
    reference_passes_saved: int
    encoder_passes_saved: int
    step_share: float


def describe_savings(
    size: ModelSize,
    *,
    pairs: int,
    draws: int,
    seen: int,
    stored_bytes: int = 2,
    gradient_checkpointing: bool = False,
) -> Savings:
    """Calculates what computing latents, text embeddings and reference errors beforehand costs and saves.

    Reference errors save time where training sees each draw more than once (``seen > pairs * draws``); what they
    save in memory does not depend on it.

    Args:
        size: the model's.
        pairs: in the cache.
        draws: for each pair.
        seen: pairs that training sees, repetitions counted: steps times the global batch.
        stored_bytes: of one number in the cache.
        gradient_checkpointing: the policy's backward pass then makes its forward pass again.
    """
    policy = 4 if gradient_checkpointing else 3
    return Savings(
        reference_bytes=size.parameters * 2,  # in half precision
        error_bytes=pairs * draws * _ERROR_BYTES,
        latent_bytes=2 * pairs * prod(size.latents) * stored_bytes,
        text_bytes=pairs * sum(map(prod, size.text)) * stored_bytes,
        reference_passes_spent=2 * pairs * draws,
        reference_passes_saved=2 * seen,
        encoder_passes_saved=2 * max(0, seen - pairs),
        step_share=1 / (1 + policy),
    )


def savings_table(*, pairs: int, draws: int, seen: int) -> str:
    """Formats the full-size models as a Markdown table: bytes in powers of ten, weights and stored numbers in 2 bytes.

    Args:
        pairs: in the cache.
        draws: for each pair.
        seen: pairs that training sees, repetitions counted.
    """
    lines = [
        "| model | sample | reference's weights, not on the device | errors, on disk | latents, on disk | "
        "text, on disk at most | share of a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size in FULL_SIZE.items():
        s = describe_savings(size, pairs=pairs, draws=draws, seen=seen)
        lines.append(
            f"| {name} | {size.pixels} | {s.reference_bytes / 1e9:.2f} GB | {s.error_bytes / 1e6:.1f} MB | "
            f"{s.latent_bytes / 1e9:.1f} GB | {s.text_bytes / 1e9:.1f} GB | {s.step_share:.0%} |"
        )
    return "\n".join(lines) + "\n"
