"""All claims about the results, as a report and as the quotations of a page.

docs/alignment.md quotes the claims' sentences (``--page`` of the command writes them). ``tests/test_alignment.py``
checks that they are those of the committed results file.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from benchmarks.alignment import claims
from benchmarks.alignment import claims_conditions as conditions
from benchmarks.alignment.claims import Claim
from benchmarks.alignment.estimates import MissingCellsError, Results

CLAIMS = (
    claims.learns,
    claims.sensitive,
    claims.agreement_needs_beta,
    claims.sipo_goes_further,
    claims.mask_stops_training,
    claims.smaller_not_steadier,
    claims.chosen_get_worse,
    claims.alarms_tell,
    claims.one_frontier,
    claims.diversity_for_reward,
    claims.variance_at_low_noise,
    claims.low_noise_teaches_least,
    conditions.on_policy,
    conditions.parts_of_sipo,
    conditions.threshold_and_stride,
    conditions.noise,
    conditions.few_pairs,
    conditions.longer,
    conditions.slant_is_harder,
    claims.implicit_reward_knows,
    conditions.relatives,
    conditions.video,
)
"""In the order of the page."""


def all_claims(results: Results) -> list[Claim]:
    """Returns the claims for which there are enough cells."""
    made = []
    for make in CLAIMS:
        try:
            made.append(make(results))
        except MissingCellsError:
            continue
    return made


_QUOTE = re.compile(r"^<!-- (.+) -->\n(?:> .*\n)*", re.MULTILINE)


def quoted(page: str, results: Results) -> str:
    """A page with each claim's sentence below its marker, ``<!-- name of the claim -->``, in place of what is there.

    Raises:
        ValueError: a marker without a claim of that name, or a claim without a marker.
    """
    sentences = {claim.name: claim.sentence for claim in all_claims(results)}
    marked = [match[1] for match in _QUOTE.finditer(page)]
    for name in sorted({*marked} ^ {*sentences}):
        alone = "marked" if name in marked else "claimed"
        raise ValueError(f"{name!r}: is {alone} alone, expected a claim and a marker")

    def quote(match: re.Match[str]) -> str:
        lines = textwrap.wrap(sentences[match[1]], 118, break_on_hyphens=False)
        return f"<!-- {match[1]} -->\n" + "".join(f"> {line}\n" for line in lines)

    return _QUOTE.sub(quote, page)


def report(results: dict[str, Any], committed: dict[str, Any]) -> tuple[str, bool]:
    """The claims of a results file, each compared with the committed file's.

    Args:
        results: a results file's content.
        committed: likewise, to compare with; without cells nothing is compared.

    Returns:
        The text, and whether any statement that holds in one does not in the other.
    """
    theirs = {claim.name: claim for claim in all_claims(Results(committed))}
    lines, disagree = [], False
    for claim in all_claims(Results(results)):
        said = "holds" if claim.holds else "does not hold"
        if claim.name in theirs:
            same = theirs[claim.name].holds == claim.holds
            disagree = disagree or not same
            said += ", agrees with the committed results" if same else ", DISAGREES with the committed results"
        lines.append(f"- {claim.name}: {said}.\n  {claim.sentence}")
    missing = len(CLAIMS) - len(lines)
    lines.append(
        f"{missing} further claims need cells that are not here."
        if missing
        else "No cell that a claim needs is missing."
    )
    return "\n".join(lines), disagree
