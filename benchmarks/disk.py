"""Bytes on disk per stored activation, on real text: a whole store, the same activations and tokens as delphi 0.1.3 keeps them, and floors.

The bundled model and both bundled coders (TopK, 24 active of 2560) over the standard library's source, cached by ``autointerp
cache`` as a user would. Every file of the store is counted: also tokens, the tokenizer, statistics of the latents and the manifest.
``derived/``, which can be deleted at any time and which stores below 2^19 tokens do not keep, is counted by itself. delphi's files
are those of each module in five splits, each with all tokens (`incumbent.export_store`); the tokenizer is not among them. With
``--python``, the python of an environment that has delphi, it is delphi's own ``LatentCache.save_splits`` that writes them, and
tensors are compared with those of the export. Floors hold the activations alone, in numpy arrays or parquet files as pyarrow writes
them by default with zstd.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.billion import CLI
from benchmarks.incumbent import NUM_SPLITS, Environment, export_store
from benchmarks.limits import disk_bytes
from benchmarks.memory import BUNDLED
from benchmarks.reporting import write_report

PARTS = {
    "activations": "activations",
    "latents.parquet": "statistics of the latents",
    "tokens": "tokens",
    "tokenizer": "tokenizer",
    "derived": "derived",
}

DELTA, PLAIN, SPLIT, ALL = "DELTA_BINARY_PACKED", "PLAIN", "BYTE_STREAM_SPLIT", ("latent", "position", "activation")
ENCODINGS: list[tuple[str | None, str | None, tuple[str, ...]]] = [
    (DELTA, PLAIN, ("activation",)),
    (DELTA, SPLIT, ("activation",)),
    (DELTA, PLAIN, ALL),
    (DELTA, PLAIN, ()),
    (PLAIN, PLAIN, ALL),
    (None, None, ALL),
]
"""Encodings of indices and of values (None: a dictionary, parquet's default), and what zstd compresses; the first is the store's."""


def store_parts(store: Path) -> Counter[str]:
    """Return the bytes of each part of a store."""
    sizes: Counter[str] = Counter()
    for file in store.rglob("*"):
        if file.is_file():
            names = file.relative_to(store).parts
            part = next((PARTS[name] for name in names if name in PARTS), "manifest, documents, records of the coders")
            sizes[part] += file.stat().st_size
    return sizes


def save_as_delphi(store_path: Path, folder: Path) -> None:
    """Give delphi's cache a store's activations as its forward pass collects them, and let it save them."""
    import torch
    from delphi.latents.cache import LatentCache

    from autointerp.store import open_store

    store = open_store(store_path)
    for name in store.coder_names:
        cache = LatentCache(torch.nn.Module(), {}, batch_size=8)
        latents, positions, values = (np.concatenate(column) for column in zip(*store.coder(name).blocks(), strict=True))
        order = np.lexsort((latents, positions))
        at = positions[order].astype(np.int64)
        locations = np.stack([at // store.ctx_len, at % store.ctx_len, latents[order]], axis=1)
        cache.width = store.coder(name).width
        cache.cache.latent_locations[name] = torch.from_numpy(locations)
        cache.cache.latent_activations[name] = torch.from_numpy(values[order])
        cache.cache.tokens[name] = torch.from_numpy(store.tokens.reshape(-1, store.ctx_len).astype(np.int64))
        cache.save_splits(n_splits=NUM_SPLITS, save_dir=folder / "latents")


def check_same(ours: Path, theirs: Path) -> int:
    """Return how many files there are, each with the same tensors in both folders. Raises: SystemExit."""
    from safetensors.numpy import load_file

    names = [sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors")) for folder in (ours, theirs)]
    if names[0] != names[1]:
        raise SystemExit(f"delphi wrote {names[1]} and the export {names[0]}")
    for name in names[0]:
        a, b = load_file(ours / name), load_file(theirs / name)
        if not (a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a)):
            raise SystemExit(f"{name}: the tensors that delphi saved are not those of the export")
    return len(names[0])


def floors(store: Any, folder: Path) -> Counter[str]:
    """Write the activations of all coders in other forms; return the bytes of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes: Counter[str] = Counter()
    for name in store.coder_names:
        latents, positions, values = (np.concatenate(column) for column in zip(*store.coder(name).blocks(), strict=True))
        columns = {
            "latent": latents.astype(np.uint32),
            "position": positions.astype(np.uint32),
            "activation": values.astype(np.float16),
        }
        starts = np.searchsorted(latents, np.arange(store.coder(name).width + 1))
        sizes["raw triples: latent and position uint32, value float16"] += sum(column.nbytes for column in columns.values())
        sizes["raw CSR: position uint32, value float16, starts int64"] += (
            columns["position"].nbytes + columns["activation"].nbytes + starts.nbytes
        )
        order = np.lexsort((latents, positions))
        for form, rows in (("by latent", slice(None)), ("by position", order)):
            file = folder / "floor.parquet"
            pq.write_table(pa.table({key: column[rows] for key, column in columns.items()}), file, compression="zstd")
            sizes[f"parquet, zstd, defaults, {form}"] += file.stat().st_size
    return sizes


def encodings(part: Path, folder: Path) -> list[str]:
    """Write the row groups of a part of a store in other ways; return lines with bytes and time per activation."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(part) as file:
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    num = sum(map(len, groups))
    lines = [
        "| latent, position | activation | compressed | bytes per activation | ns to write | ns to read |",
        "|---|---|---|---|---|---|",
    ]
    for indices, values, compressed in ENCODINGS:
        encoding = {"latent": indices, "position": indices, "activation": values}
        path = folder / "encoded.parquet"
        write, read = [], []
        for _ in range(3):
            start = time.process_time()
            with pq.ParquetWriter(
                path,
                groups[0].schema,
                compression={name: "zstd" if name in compressed else "none" for name in encoding},
                use_dictionary=indices is None,
                column_encoding=None if indices is None else encoding,
                write_statistics=["latent", "position"],
                write_page_checksum=True,
            ) as writer:
                for group in groups:
                    writer.write_table(group, row_group_size=len(group))
            write.append(time.process_time() - start)
            start = time.process_time()
            with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
                for number in range(file.num_row_groups):
                    file.read_row_group(number, use_threads=False)
            read.append(time.process_time() - start)
        cells = [indices or "dictionary", values or "dictionary", ", ".join(compressed) or "nothing"]
        figures = [f"{path.stat().st_size / num:.3f}", *(f"{1e9 * min(times) / num:.1f}" for times in (write, read))]
        lines.append(f"| {' | '.join([*cells, *figures])} |")
    return lines


def measure(tokens: int, python: str | None, folder: Path) -> list[str]:
    """Cache, export and write floors; return the lines of the report."""
    from autointerp.store import open_store

    store_path = folder / "store"
    arguments = ["-q", "cache", *BUNDLED, "--corpus", "stdlib", "--tokens", str(tokens), "--out", str(store_path)]
    subprocess.run([sys.executable, "-c", CLI, *arguments], check=True)
    store = open_store(store_path)
    num = sum(store.coder(name).num_activations for name in store.coder_names)
    for name in store.coder_names:
        export_store(store, name, folder / "delphi")
    delphi, written = disk_bytes(folder / "delphi" / "latents"), "written by the export"
    tokens_bytes = len(store.coder_names) * NUM_SPLITS * store.num_tokens * 8
    if python is not None:
        environment = Environment(python, folder)
        environment.run("disk", "--child", store_path, folder / "own")
        files = check_same(folder / "delphi" / "latents", folder / "own" / "latents")
        delphi = disk_bytes(folder / "own" / "latents")
        written = f"written by delphi's own save_splits, tensors of all {files} files the same as the export's; {environment.versions()}"
    parts = store_parts(store_path)
    derived = parts.pop("derived", 0)
    ours = sum(parts.values())
    rows = [("**ours, the whole store**", ours), *((f"of ours: {part}", count) for part, count in parts.most_common())]
    rows += [("ours with `derived/`", ours + derived), ("**delphi**", delphi)]
    rows += [("of delphi: locations and values", delphi - tokens_bytes), ("of delphi: tokens", tokens_bytes)]
    rows += floors(store, folder).items()
    lines = [
        f"{num:,} activations of {len(store.coder_names)} coders on {store.num_tokens:,} tokens.",
        "",
        "| | bytes | per activation | over our whole store |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {count:,} | {count / num:.3f} | {count / ours:.2f} |" for name, count in rows]
    lines += [
        "",
        f"delphi over ours: **{delphi / ours:.2f}** ({written}); over ours with `derived/`: {delphi / (ours + derived):.2f}.",
    ]
    coder = store.coder_names[0]
    part = store_path / "coders" / f"coder={coder}" / "activations" / "part-00000.parquet"
    lines += ["", f"The activations of coder {coder} in other encodings, row groups as they are:", ""]
    lines += [
        *encodings(part, folder),
        "",
        "The first is the store's. DuckDB cannot read the second for float16. Best of three, one thread.",
    ]
    return [*lines, "", " ".join(__doc__.split("\n\n")[1].split())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_192)
    parser.add_argument("--python", help="python of an environment that has delphi too: let it write its own files")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        save_as_delphi(*args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(args.tokens, args.python, Path(folder))
    print("\n".join(lines))
    if args.write:
        print(write_report("disk", "\n".join(lines)))


if __name__ == "__main__":
    main()
