"""What a store holds, and what one that is being built or extended still lacks, told from its folder alone."""

from __future__ import annotations

from pathlib import Path

from autointerp.errors import StoreError
from autointerp.files import read_sealed
from autointerp.store.build import BuildState
from autointerp.store.layout import CORPUS, GROWN, MANIFEST, STATE, merged_marker
from autointerp.store.manifest import read_manifest
from autointerp.store.runs import read_runs


def is_store(path: Path) -> bool:
    """Return whether a folder is a store, finished or begun."""
    return any((path / name).exists() for name in (MANIFEST, STATE, GROWN))


def store_status(path: Path) -> str:
    """Return a few lines for people.

    Raises: StoreError when there is no store, or its new files are moving into place this moment.
    """
    if not is_store(path):
        raise StoreError(f"{path} holds no store, finished or begun")
    lines = []
    if (path / MANIFEST).exists() or not (path / STATE).exists():
        extent = read_manifest(path).extent
        lines.append(f"{path}: {extent.num_tokens:,} tokens of {extent.num_documents:,} documents")
        for name, coder in extent.coders.items():
            lines.append(f"  {name}: {coder.width:,} latents, {coder.num_activations:,} activations")
    if (path / STATE).exists():
        lines += _build(path, f"adding coders to {path}" if lines else f"{path} is not finished")
    if (path / GROWN / STATE).exists():
        lines += _build(path / GROWN, f"extending {path}")
    return "\n".join(lines)


def _build(path: Path, title: str) -> list[str]:
    """Return what a build lacks."""
    state = BuildState.parse(read_sealed(path / STATE), where=str(path / STATE))
    runs = read_runs(path)
    wanted = state.provenance.get("corpus", {}).get("num_tokens")
    of = f" of {wanted:,}" if wanted else ""
    num_tokens = sum(run.num_tokens for run in runs.values())
    lines = [
        f"{title}: {', '.join(state.coders)}",
        f"  {len(runs)} runs of up to {state.contexts_per_run:,} contexts, {num_tokens:,}{of} tokens",
    ]
    if (path / CORPUS).exists():
        done = [name for name in state.coders if (path / merged_marker(name)).exists()]
        lines.append(f"  all runs are there; merged: {', '.join(done) or 'no coder yet'}")
    elif state.num_workers is not None:
        count = state.num_workers
        # How many runs there will be is known when the corpus was read; up to the last one that is there they should be.
        gaps = [run for run in range(max(runs, default=-1)) if run not in runs]
        whose = [f"worker {index}: {sum(run % count == index for run in runs)}" for index in range(count)]
        lines.append(f"  runs by {', '.join(whose)}; {len(gaps)} missing before the last one")
    lines.append("  run the same cache command again to go on" + (" (without --worker to merge)" if state.num_workers else ""))
    return lines
