"""A report as one HTML page that needs nothing else: verdict, figures, pictures, settings."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sipo
from sipo.analysis.findings import Finding

BEGIN = '<!doctype html>\n<html lang="en">\n<head>\n<meta name="generator" content="sipo analyze">'
"""How a page begins, and no other program's."""

_TITLES = {"problem": "Problem", "warning": "Warning", "good": "Good", "note": "Note"}

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1d2127; --soft: #5b6472; --grid: #d5dae1;
  --problem: #b3261e; --warning: #9a6200; --good: #1a7f4b; --note: #2a6db0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2126; --ink: #e6e9ee; --soft: #9aa4b2;
  --grid: #3a414b; --problem: #ff8a80; --warning: #f0b355; --good: #62cf98; --note: #7db8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.35rem; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; border-bottom: 1px solid var(--grid); padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
.soft, figcaption, footer { color: var(--soft); font-size: .88rem; }
.finding { border-left: 5px solid var(--tone); background: var(--card); padding: .9rem 1.1rem; margin: .8rem 0;
  border-radius: 0 6px 6px 0; break-inside: avoid; }
.finding > strong { color: var(--tone); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; }
.finding p { margin: .15rem 0 .5rem; }
.finding.first > p { font-size: 1.25rem; line-height: 1.35; font-weight: 600; }
.finding h3 { font-size: .88rem; margin: .6rem 0 .1rem; color: var(--soft); }
.finding ul { margin: 0; padding-left: 1.2rem; font-size: .93rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit; }
figure img { min-width: 16rem; max-width: 100%; height: auto; display: block; }
figcaption { margin-top: .3rem; }
.sample { display: flex; flex-direction: column; justify-content: flex-end; }
.sample h3 { font-weight: 400; overflow-wrap: anywhere; }
.looks { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
.looks img, .looks video { width: 100%; min-width: 0; max-width: 24rem; display: block; }
.settings { columns: 2 24rem; column-gap: 2.5rem; font-size: .88rem; }
.settings div { display: flex; gap: 1.2rem; justify-content: space-between; padding: .15rem 0;
  border-bottom: 1px solid var(--grid); break-inside: avoid; }
.settings dt { white-space: nowrap; }
.settings dd { margin: 0; text-align: right; min-width: 0; overflow-wrap: anywhere; color: var(--soft); }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
footer { margin-top: 3rem; }
@media print { :root { color-scheme: light; --paper: #fff; --card: #f6f7f9; --ink: #1d2127; --soft: #5b6472;
  --grid: #d5dae1; --problem: #b3261e; --warning: #9a6200; --good: #1a7f4b; --note: #2a6db0; }
  body { max-width: none; padding: 0; font-size: 11pt; } .figures { grid-template-columns: 1fr 1fr; }
  .finding { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


@dataclass(frozen=True)
class Picture:
    """A figure of a page.

    Attributes:
        title: what it shows; of a sample, its prompt.
        content: SVG, or images.
        caption: one sentence: what healthy looks like.
        kind: "sample" for samples.
    """

    title: str
    content: str
    caption: str = ""
    kind: str = ""

    def html(self) -> str:
        """Renders the figure."""
        caption = f"<figcaption>{_prose(self.caption)}</figcaption>" if self.caption else ""
        kind = f' class="{self.kind}"' if self.kind else ""
        return f"<figure{kind}><h3>{_text(self.title)}</h3>{self.content}{caption}</figure>"


@dataclass(frozen=True)
class Page:
    """Everything on a page, in its order.

    Attributes:
        title: what was looked at.
        about: a line under it.
        findings: the headline first.
        sections: heading, a remark or "", and pictures.
        settings: names and values.
    """

    title: str
    about: str
    findings: Sequence[Finding]
    sections: Sequence[tuple[str, str, Sequence[Picture]]]
    settings: dict[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """Renders the page."""
        parts = [
            f'{BEGIN}\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f'<h1>{_text(self.title)}</h1>\n<p class="soft">{_text(self.about)}</p>',
        ]
        parts += [_finding(finding, number == 0) for number, finding in enumerate(self.findings)]
        for heading, remark, pictures in self.sections:
            parts.append(f"<h2>{_text(heading)}</h2>")
            if remark:
                parts.append(f'<p class="soft">{_prose(remark)}</p>')
            parts.append('<div class="figures">')
            parts += [picture.html() for picture in pictures]
            parts.append("</div>")
        if self.settings:
            rows = "".join(
                f"<div><dt>{_text(name)}</dt><dd>{_text(_value(value))}</dd></div>"
                for name, value in self.settings.items()
            )
            parts.append(f'<h2>Settings</h2>\n<dl class="settings">{rows}</dl>')
        parts.append(
            f"<footer>Made by <code>sipo analyze</code>, sipo {sipo.__version__}. What the numbers are: "
            "docs/math.md §8; how to read the verdicts: docs/analyze.md.</footer>\n</body>\n</html>\n"
        )
        return "\n".join(parts)


def image(data: bytes, name: str) -> str:
    """Embeds a PNG in a page, with its alternative text."""
    return f'<img alt="{_text(name)}" src="{_inline("image/png", data)}">'


def video(data: bytes, name: str) -> str:
    """Embeds an MP4 in a page."""
    return f'<video controls loop muted playsinline title="{_text(name)}" src="{_inline("video/mp4", data)}"></video>'


def side_by_side(pictures: Sequence[tuple[str, str]]) -> str:
    """Places pictures side by side, each with its caption below."""
    cells = (f'<div>{content}<span class="soft">{_text(name)}</span></div>' for content, name in pictures)
    return f'<div class="looks">{"".join(cells)}</div>'


def describe(findings: Sequence[Finding]) -> str:
    """Formats the verdict for a terminal."""
    lines = []
    for finding in findings:
        lines.append(f"{_TITLES[finding.severity].upper()}: {finding.sentence}")
        lines += [f"  - {_plain(text)}" for text in finding.evidence]
        lines += [f"  try: {_plain(text)}" for text in finding.advice]
    return "\n".join(lines)


def _finding(finding: Finding, first: bool) -> str:
    found = [f"<strong>{_TITLES[finding.severity]}</strong><p>{_prose(finding.sentence)}</p>"]
    for heading, texts in (("Evidence", finding.evidence), ("What to try", finding.advice)):
        if texts:
            items = "".join(f"<li>{_prose(text)}</li>" for text in texts)
            found.append(f"<h3>{heading}</h3><ul>{items}</ul>")
    kind = "finding first" if first else "finding"
    return f'<section class="{kind}" style="--tone: var(--{finding.severity})">{"".join(found)}</section>'


def _text(value: object) -> str:
    plain = str(value).encode("utf-8", "replace").decode()  # JSON and YAML can hold half of a character
    return html.escape(plain)


def _prose(text: str) -> str:
    """Converts text with names between backticks to HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(text))


def _plain(text: str) -> str:
    return text.replace("`", "")


def _inline(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _value(value: object) -> str:
    """Formats a setting as a configuration has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
