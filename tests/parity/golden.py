"""Write one parity case; README.md in this folder says what it holds. Needs numpy and safetensors only, so that it runs beside any publisher's package."""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SCHEMA = 1
NUM_TOKENS = 104
MIN_L0 = 5


def seed_of(name: str) -> int:
    """Return a seed that depends on the case's name alone."""
    return zlib.crc32(name.encode())


def draw_inputs(name: str, d_in: int, num_tokens: int = NUM_TOKENS) -> np.ndarray:
    """Return float32 [N, d_in]: rows of different norm (factor 0.5 to 3) and mean, around a common offset."""
    generator = np.random.default_rng(seed_of(name))
    x = generator.normal(size=(num_tokens, d_in)) + 0.4 * generator.normal(size=(1, d_in))
    x = x * np.exp(generator.uniform(np.log(0.5), np.log(3), size=(num_tokens, 1))) + 0.3 * generator.normal(
        size=(num_tokens, 1)
    )
    return np.ascontiguousarray(x, dtype=np.float32)


def save_case(
    root: Path,
    name: str,
    write_coder: Callable[[Path], str],
    *,
    x: np.ndarray,
    acts: np.ndarray,
    out: np.ndarray,
    format: str,
    publisher: str,
    version: str,
    architecture: str,
    saved_by: str,
    computed_by: str,
    hookpoint: str | None,
    variant: str = "",
    target: str | None = None,
    is_transcoder: bool = False,
    options: Mapping[str, str] | None = None,
) -> None:
    """Write the case `name` below `root`, replacing it.

    `write_coder(folder)` writes the publisher's files below `folder` and returns the path to load, relative to it ("." for the
    folder itself); `x` [N, d_in], dense `acts` [N, width] and `out` [N, d_out] are the publisher's.
    """
    x, acts, out = (np.ascontiguousarray(array, dtype=np.float32) for array in (x, acts, out))
    assert 100 <= len(x) == len(acts) == len(out) < 256, name
    assert x.shape[1] != acts.shape[1] < 256, name
    for array in (x, acts, out):
        assert np.isfinite(array).all(), name
    rows, latents = acts.nonzero()
    assert len(rows) / len(x) >= MIN_L0, f"{name}: mean L0 {len(rows) / len(x):.2f}"
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "coder").mkdir(parents=True)
    relative = write_coder(folder / "coder")
    golden = {
        "x": x,
        "rows": rows.astype(np.uint8),
        "latents": latents.astype(np.uint8),
        "values": acts[rows, latents],
        "out": out,
    }
    save_file(golden, folder / "golden.safetensors")
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "format": format,
        "publisher": publisher,
        "version": version,
        "architecture": architecture,
        "variant": variant,
        "path": "coder" if relative == "." else f"coder/{relative}",
        "options": dict(options or {}),
        "saved_by": saved_by,
        "computed_by": computed_by,
        "hookpoint": hookpoint,
        "target": target,
        "is_transcoder": is_transcoder,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 40_000, f"{name}: {size} bytes"
    print(f"{name}: {len(x)} tokens, mean L0 {len(rows) / len(x):.1f}, {size} bytes")


def folder_argument() -> Path:
    """Return the folder named on the command line as ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    return Path(parser.parse_args().out)
