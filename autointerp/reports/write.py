"""Writes the report: a page per latent in one pass over the tables, then the index.

A static folder that opens from disk without a network. Equal tables give equal bytes; an earlier report in the same place is
replaced, anything else is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from autointerp import __version__
from autointerp.errors import StoreError
from autointerp.files import disk_errors, write_json
from autointerp.jobs.control_gaps import recorded_gaps
from autointerp.reports.coders import FILES, coders_frame, side_by_side
from autointerp.reports.index import (
    coder_folder,
    coverage_rows,
    density_rows,
    headline_rows,
    pick_groups,
    pool_rows,
    series_names,
    table_data,
    table_texts,
)
from autointerp.reports.pages import STATUS_WORDS, latent_page
from autointerp.reports.source import Key, Source
from autointerp.reports.summary import Overview, choose, overview
from autointerp.reports.text import visible

ASSETS = ("report.css", "theme.js", "index.js", "latent.js")
MARKER = "report.json"
"""Says that a folder is a report, so that the next one may replace it."""
POOL_WORDS = {
    "explain": "The explainer saw this window, or could have",
    "score": "This window was scored",
    "validate": "Set aside for choosing between explanations",
}


def write_report(
    results_folder: Path | str,
    out: Path | str | None = None,
    *,
    limit: int | None = None,
    max_examples: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a report of a results folder and return the path of its index.

    Only the parquet tables are read, and what the methods recorded of themselves where that lies beside them. `limit`: at most
    so many latents get a page (the index says how many did not).
    `max_examples`: windows per pool and kind on a page. `progress` is called with (written, total).
    Raises: StoreError when there is nothing to report on, or `out` holds other files.
    """
    source = Source(results_folder)
    target = Path(out) if out is not None else source.folder / "report"
    _check_target(target)
    found = overview(source)
    chosen = choose(found, limit)
    name = visible(source.folder.resolve().name)
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / MARKER, {"autointerp_report": 1})
        _write_assets(target)
        site = _Site(target, name)
        texts: dict[Key, list[str | None]] = {}
        written: set[Path] = set()
        for number, (key, path, row) in enumerate(_pages(site, source, found, chosen, max_examples), start=1):
            texts[key] = row
            written.add(path)
            if progress is not None:
                progress(number, len(chosen))
        _remove_stale(target / "latents", written)
        index = _index(found, chosen, texts) | {"coders": _coders(target, found), "gaps": recorded_gaps(source.folder)}
        return site.write("index.html", "index.html.j2", **index)


def write_page(out: Path, template: str, *, name: str, **values: Any) -> Path:
    """Write a page of one's own beside the report's assets, to ``out/index.html``, and return its path.

    `template` is one of this package's. Raises: StoreError when `out` holds other files.
    """
    _check_target(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MARKER, {"autointerp_report": 1})
        _write_assets(out)
        return _Site(out, visible(name)).write("index.html", template, **values)


def _check_target(target: Path) -> None:
    if target.is_dir() and not (target / MARKER).is_file() and any(target.iterdir()):
        raise StoreError(f"cannot write a report to {target}: it holds other files; choose a new or empty folder with --out")
    if target.exists() and not target.is_dir():
        raise StoreError(f"cannot write a report to {target}: it is a file; choose a folder with --out")


@cache
def _templates() -> jinja2.Environment:
    # Text reaches a template through `visible` in finalize, then autoescape; markup made by this package is passed through.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autointerp.reports"),
        autoescape=True,
        auto_reload=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_harmless,
    )
    environment.globals.update(version=__version__, words=dict(STATUS_WORDS), pool_words=POOL_WORDS)
    return environment


class _Site:
    """Renders templates into the report's folder."""

    def __init__(self, target: Path, name: str) -> None:
        self.target, self._name = target, name

    def write(self, path: str, template: str, **values: Any) -> Path:
        """Render `template` to `path`, whole or not at all."""
        place = self.target / path
        root = "../" * path.count("/")
        text = _templates().get_template(template).render(name=self._name, root=root, **values)
        place.parent.mkdir(parents=True, exist_ok=True)
        # No flush to disk: pages are derived, and ten thousand flushes would take longer than the pages.
        temporary = place.with_name(f".tmp-{place.name}")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(place)
        return place


def _harmless(value: Any) -> Any:
    return visible(value) if type(value) is str else value


def _pages(
    site: _Site, source: Source, found: Overview, chosen: Sequence[Key], max_examples: int
) -> Iterator[tuple[Key, Path, list[str | None]]]:
    labels = found.explainers()
    neighbours = _neighbours(chosen)
    for (coder, latent), rows in source.latents(chosen):
        page = latent_page(coder, latent, rows, max_examples=max_examples)
        page.density = found.density.get(coder, {}).get(latent)
        page.status = found.status(coder, latent)
        before, after = neighbours[coder, latent]
        path = site.write(
            f"latents/{coder_folder(coder)}/{latent}.html",
            "latent.html.j2",
            page=page,
            several=len(page.explanations) > 1,
            before=None if before is None else {"latent": before, "href": f"{before}.html"},
            after=None if after is None else {"latent": after, "href": f"{after}.html"},
        )
        yield (coder, latent), path, table_texts(labels, page.explanations)


def _neighbours(chosen: Sequence[Key]) -> dict[Key, tuple[int | None, int | None]]:
    ordered = sorted(chosen)
    found: dict[Key, tuple[int | None, int | None]] = {}
    for i, key in enumerate(ordered):
        before = ordered[i - 1] if i else None
        after = ordered[i + 1] if i + 1 < len(ordered) else None
        found[key] = (
            before[1] if before and before[0] == key[0] else None,
            after[1] if after and after[0] == key[0] else None,
        )
    return found


def _index(found: Overview, chosen: Sequence[Key], texts: Mapping[Key, Sequence[str | None]]) -> dict[str, Any]:
    groups, picks_by = pick_groups(found, texts)
    by_density = density_rows(found)
    return {
        "num_latents": found.num_latents,
        "num_pages": len(chosen),
        "left_out": found.num_latents - len(chosen),
        "series": headline_rows(found),
        "coverage": coverage_rows(found),
        "pools": pool_rows(found),
        "by_density": by_density,
        "density_columns": series_names(list(found.series)),
        "has_density": bool(by_density),
        "partners": sorted(found.partners.items()),
        "unplanned": found.unplanned,
        "picks": groups,
        "picks_by": picks_by,
        "data": table_data(found, chosen, texts),
    }


def _coders(target: Path, found: Overview) -> dict[str, Any] | None:
    """Write the table of coders side by side and return what the index shows of it; None where fewer than two are scored."""
    frame = coders_frame(found)
    is_shown = frame["coder"].nunique() > 1
    for name in FILES:
        (target / name).unlink(missing_ok=True)
    if not is_shown:
        return None
    frame.to_parquet(target / FILES[0], index=False)
    frame.to_csv(target / FILES[1], index=False)
    return side_by_side(found, frame)


def _write_assets(target: Path) -> None:
    assets = target / "assets"
    assets.mkdir(exist_ok=True)
    for name in ASSETS:
        (assets / name).write_bytes((files("autointerp.reports") / "static" / name).read_bytes())


def _remove_stale(pages: Path, written: set[Path]) -> None:
    """Remove pages of an earlier report that this one does not have."""
    for path in sorted(pages.glob("*/*.html")):
        if path not in written:
            path.unlink()
    for folder in sorted(pages.glob("*")):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
