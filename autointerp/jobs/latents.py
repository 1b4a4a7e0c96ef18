"""Which latents a user means: ``0-99``, ``3,7,9``, ``random:500``, ``density:1e-5..1e-2``, ``all``, or a list file.

Parts are joined by commas. ``density:`` narrows the latents that ``random:`` and ``all`` choose from, and alone means all
within. ``random:500`` is the first 500 live latents in the order of a seeded hash, hence a subset of ``random:1000``.
``all`` is every latent that fires at least once; a silent latent has to be named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autointerp.digest import hash64, seed_of
from autointerp.errors import InputError

FORMS = "expected forms such as 0-99, 3,7,9, random:500, density:1e-5..1e-2, all, or the path of a list file"
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


@dataclass(frozen=True, kw_only=True)
class CoderStatistics:
    """What choosing latents needs to know of a coder; one entry per latent."""

    coder: str
    counts: np.ndarray
    """Activations of each latent."""
    density: np.ndarray
    """Share of corpus tokens each latent fires on."""

    @property
    def width(self) -> int:
        """Number of latents."""
        return len(self.counts)


def choose_latents(
    spec: str | Sequence[int], statistics: CoderStatistics, *, seed: int, at_most: int | None = None
) -> np.ndarray:
    """Return the latents of one coder that `spec` means, ascending and without repeats; int64.

    `at_most`: ``random:``, ``all`` and ``density:`` mean at most the first so many in the order of the seeded hash; what is
    named by number stays.
    Raises: InputError when a part cannot be read, a latent does not exist, or nothing is chosen.
    """
    if not isinstance(spec, str):
        chosen = _checked([int(latent) for latent in spec], statistics, spec="the list given")
        return np.unique(chosen)
    if _is_file(spec):
        return np.unique(_checked(_from_file(Path(spec), statistics.coder), statistics, spec=spec))
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise InputError(f"--latents {spec!r} names no latent; {FORMS}")
    filters = [part for part in parts if part.startswith("density:")]
    pool = _live(statistics)
    for part in filters:
        low, high = _bounds(part)
        pool &= (statistics.density >= low) & (statistics.density <= high)
    named = [part for part in parts if part not in filters] or ["all"]
    chosen = np.unique(np.concatenate([_part(part, pool, statistics, seed=seed, at_most=at_most) for part in named]))
    if not len(chosen):
        found = statistics.density[_live(statistics)]
        extent = (
            f"its live latents fire on {found.min():.1e} to {found.max():.1e} of the tokens"
            if len(found)
            else "none ever fires"
        )
        raise InputError(f"--latents {spec!r} chooses no latent of coder {statistics.coder!r}: {extent}")
    return chosen


def hash_order(statistics: CoderStatistics, *, seed: int) -> np.ndarray:
    """Return all live latents in the order that ``random:`` takes them in; int64."""
    return _in_hash_order(np.flatnonzero(_live(statistics)), statistics.coder, seed=seed)


def _part(part: str, pool: np.ndarray, statistics: CoderStatistics, *, seed: int, at_most: int | None) -> np.ndarray:
    if part == "all":
        return _in_hash_order(np.flatnonzero(pool), statistics.coder, seed=seed)[:at_most]
    kind, colon, value = part.partition(":")
    if kind == "random" and colon:
        if not value.isdigit() or not int(value):
            raise InputError(f"--latents {part!r}: expected a count after random:, such as random:500")
        return _in_hash_order(np.flatnonzero(pool), statistics.coder, seed=seed)[: int(value)][:at_most]
    if match := _RANGE.fullmatch(part):
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise InputError(f"--latents {part!r}: the range ends before it starts; write {last}-{first}")
        _checked([first, last], statistics, spec=part)
        return np.arange(first, last + 1)
    if part.isdigit():
        return _checked([int(part)], statistics, spec=part)
    raise InputError(f"--latents has a part {part!r} that cannot be read; {FORMS}")


def _live(statistics: CoderStatistics) -> np.ndarray:
    return np.asarray(statistics.counts) > 0


def _in_hash_order(latents: np.ndarray, coder: str, *, seed: int) -> np.ndarray:
    return latents[np.argsort(hash64(seed_of("random latents", seed, coder), latents), kind="stable")]


def _bounds(part: str) -> tuple[float, float]:
    low, dots, high = part.removeprefix("density:").partition("..")
    try:
        bounds = float(low or 0), float(high or 1)
    except ValueError:
        dots = ""
    if not dots or bounds[0] > bounds[1]:
        raise InputError(f"--latents {part!r}: expected density:LOW..HIGH as shares of tokens, such as density:1e-5..1e-2")
    return bounds


def _checked(latents: list[int], statistics: CoderStatistics, *, spec: str) -> np.ndarray:
    array = np.asarray(latents, np.int64)
    outside = array[(array < 0) | (array >= statistics.width)]
    if len(outside):
        raise InputError(
            f"--latents {spec}: coder {statistics.coder!r} has no latent {outside[0]}; it has {statistics.width}, "
            f"0 to {statistics.width - 1}"
        )
    return array


def _is_file(spec: str) -> bool:
    try:
        return Path(spec).is_file()
    except (OSError, ValueError):
        return False


def _from_file(path: Path, coder: str) -> list[int]:
    """Latents of a list file: a latent per line, or a coder and a latent with a comma, a slash or a space between."""
    latents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text or text.replace(" ", "") == "coder,latent":
            continue
        name, _, latent = text.replace(",", " ").replace("/", " ").rpartition(" ")
        if not latent.isdigit():
            raise InputError(f"{path}, line {number}: {line.strip()!r} is not a latent; expected LATENT or CODER,LATENT")
        if not name.strip() or name.strip() == coder:
            latents.append(int(latent))
    return latents
