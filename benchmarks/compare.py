"""What became slower or faster between two results files: ``python -m benchmarks.compare old.json new.json``.

A case of one implementation counts as changed when its quartiles do not overlap and its median moved by more than
``--percent`` (10). Cases of more bytes than the caches hold are bound by memory: their times are first scaled by how
the machine's copy bandwidth changed between the runs, so that a slow day of a shared machine is not taken for a slow
kernel. Wall time is compared, and on a GPU device time as well. Reads the results of ``benchmarks.kernel``,
``benchmarks.sweep``, ``benchmarks.step`` and ``benchmarks.host``.

Exit code: 0 nothing of ours became slower (``--everything``: nothing at all), 1 something did, 2 the files cannot be
compared (another kind, another device; ``--force`` compares devices all the same).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.baselines import OURS
from benchmarks.machine import caption, disturbed

KEY = ("label", "shape", "pairs", "dtype", "target", "shared_target", "ref_error", "upstream", "mode", "state")
CPU_CACHE_MIB = 32.0


class Change(NamedTuple):
    """One time of one implementation in one case, before and after.

    Attributes:
        case: what was measured, as text.
        implementation: its name.
        time: ``"wall"``, ``"device"``, ... (:func:`times`).
        old: the median before, milliseconds.
        new: the median now.
        ratio: new over old, after the change of the copy bandwidth was taken out where the case is bound by memory.
        verdict: ``"slower"``, ``"faster"`` or ``""``.
    """

    case: str
    implementation: str
    time: str
    old: float
    new: float
    ratio: float
    verdict: str


def key(entry: dict[str, Any]) -> str:
    """Returns the case as text: what has to be equal in both files."""
    parts = []
    for name in KEY:
        value = entry.get(name)
        if isinstance(value, bool) or value is None:
            parts += [name] * bool(value)
        else:
            parts.append("×".join(map(str, value)) if isinstance(value, list) else f"{value}")
    return " ".join(parts)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns why the two files do not measure the same thing; empty if they do."""
    fields = ("device", "device_type", "threads", "multiprocessors")
    pairs = [("kind", old["kind"], new["kind"])]
    pairs += [(field, old["machine"].get(field), new["machine"].get(field)) for field in fields]
    return [f"{field}: {before} and {now}" for field, before, now in pairs if before != now]


def notes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yields what a reader has to know before believing the table."""
    for field in ("torch", "triton", "driver", "cuda", "python", "native", "clocks"):
        before, now = old["machine"].get(field), new["machine"].get(field)
        if before != now:
            yield f"{field} changed: {before} → {now}"
    for name, results in (("old", old), ("new", new)):
        if busy := disturbed(results["cases"]):
            yield f"{name}: other processes were busy during {busy} of {len(results['cases'])} entries"
        if not results.get("complete", True):
            yield f"{name}: the run was cut off"
    before, now = ({key(entry) for entry in results["cases"]} for results in (old, new))
    for name, alone in (("old", before - now), ("new", now - before)):
        if alone:
            yield f"only in {name}, not compared: {len(alone)} entries, e.g. {min(alone)}"


def copy_bandwidth(results: dict[str, Any]) -> float | None:
    """Returns the run's median copy bandwidth, GB/s."""
    median: float | None = results.get("copy_bandwidth_gb_s", {}).get("median")
    return median


def changes(old: dict[str, Any], new: dict[str, Any], percent: float) -> list[Change]:
    """Returns every time that both files have."""
    before = {key(entry): entry for entry in old["cases"]}
    rates = copy_bandwidth(old), copy_bandwidth(new)
    machine = new["machine"]
    cache = 2**20 * (machine.get("l2_mib") or machine.get("cpu_cache_mib") or CPU_CACHE_MIB)
    compared = []
    for entry in new["cases"]:
        earlier = before.get(key(entry))
        if earlier is None:
            continue
        # A run in which memory was slower by some factor may take longer by that factor.
        large = entry.get("floor_bytes", 0) > cache
        for name, result in entry["results"].items():
            then = times(earlier["results"].get(name, {}))
            for time, now in times(result).items():
                # A whole training step does more than move these bytes.
                bound = large and (new["kind"] != "step" or time.startswith("loss alone"))
                scale = rates[1] / rates[0] if bound and rates[0] and rates[1] else 1.0
                if time in then:
                    compared.append(_change(key(entry), name, time, then[time], now, scale, percent))
    return compared


def times(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is compared, by name: wall and device time; the loss alone's in a step file, host time in a host file."""
    wall, direct = result.get("wall_ms"), result.get("direct_ms") or {}
    named = {"wall": wall, "device": result.get("device_ms"), "host": None if wall else result.get("host_ms")}
    named.update({"loss alone, wall": direct.get("wall_ms"), "loss alone, device": direct.get("device_ms")})
    return {name: time for name, time in named.items() if time}


def _change(
    case: str, name: str, time: str, old: dict[str, Any], new: dict[str, Any], scale: float, percent: float
) -> Change:
    ratio = scale * new["median"] / old["median"]
    low, high = (scale * quartile for quartile in new["quartiles"])
    verdict = ""
    if low > old["quartiles"][1] and ratio > 1 + percent / 100:
        verdict = "slower"
    elif high < old["quartiles"][0] and ratio < 1 / (1 + percent / 100):
        verdict = "faster"
    return Change(case, name, time, old["median"], new["median"], ratio, verdict)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--percent", type=float, default=10.0, help="smallest change that counts (default %(default)s)")
    parser.add_argument("--everything", action="store_true", help="baselines that became slower count too")
    parser.add_argument("--unchanged", action="store_true", help="list what did not change as well")
    parser.add_argument("--force", action="store_true", help="compare different devices all the same")
    args = parser.parse_args(argv)
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (args.old, args.new))

    unequal = differences(old, new)
    for line in unequal:
        print(f"not the same {line}", file=sys.stderr)
    if unequal and (not args.force or old["kind"] != new["kind"]):
        print("these files cannot be compared (--force: different devices all the same)", file=sys.stderr)
        return 2
    print(f"old: {caption(old['machine'])}\nnew: {caption(new['machine'])}")
    rates = copy_bandwidth(old), copy_bandwidth(new)
    if rates[0] and rates[1]:
        print(f"copy bandwidth {rates[0]:.1f} → {rates[1]:.1f} GB/s; taken out of cases larger than the caches")
    for note in notes(old, new):
        print(f"note: {note}")

    compared = changes(old, new, args.percent)
    if not compared:
        print("the files have no case in common", file=sys.stderr)
        return 2
    shown = [change for change in compared if change.verdict or args.unchanged]
    for change in sorted(shown, key=lambda change: -change.ratio):
        print(
            f"{change.verdict:8} {change.ratio:6.2f}x  {change.old:9.3f} → {change.new:9.3f} ms  "
            f"{change.time:6}  {change.implementation:24}  {change.case}"
        )
    everything = args.everything or new["kind"] == "host"  # there, all is ours
    slower = [c for c in compared if c.verdict == "slower" and (everything or c.implementation.startswith(OURS))]
    faster = sum(change.verdict == "faster" for change in compared)
    unchanged = sum(not change.verdict for change in compared)
    print(f"{len(compared)} times compared: {unchanged} unchanged, {faster} faster, {len(slower)} regressions")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
