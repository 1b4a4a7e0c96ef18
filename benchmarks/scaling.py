"""Caching over tokens, width and number of coders: CPU time, peak memory and disk, one thing varied at a time.

The bundled model over the standard library; random TopK coders (k = 32) on its third layer, in the sparsify format, each case in a
fresh process with one thread, from start to finished store. What should hold: time per token is the same whatever the number of
tokens, memory does not grow with it, and a coder more costs its own encoding and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.reporting import write_report

K, BASE_TOKENS, BASE_WIDTH = 32, 131_072, 4096
TOKENS, WIDTHS, CODERS = (65_536, 262_144, 1_048_576), (4096, 16_384, 65_536), (1, 2, 4, 8)


def random_coder(folder: Path, width: int, seed: int) -> Path:
    """Write a TopK coder of unit directions for the bundled model."""
    import torch
    from safetensors.torch import save_file

    from autointerp.demo import bundled

    d_model = json.loads((bundled("model") / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.functional.normalize(torch.randn(width, d_model, generator=generator), dim=1)
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": weight,
        "encoder.bias": torch.zeros(width),
        "W_dec": weight.clone(),
        "b_dec": torch.zeros(d_model),
    }
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps({"d_in": d_model, "num_latents": width, "k": K, "expansion_factor": width / d_model})
    )
    return folder


def child(folder: Path, tokens: int, width: int, coders: int) -> None:
    """Cache in this process; print the figures as JSON."""
    import torch

    from autointerp.demo import bundled
    from autointerp.jobs.cache import cache

    torch.set_num_threads(1)
    sources = [random_coder(folder / "coders" / str(seed), width, seed) for seed in range(coders)]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu, wall = usage.ru_utime + usage.ru_stime, time.perf_counter()
    store = cache(
        {
            "subject": str(bundled("model")),
            "corpus": {"source": "stdlib", "num_tokens": tokens},
            "coders": [{"name": f"c{i}", "source": str(source), "hookpoint": "layers.2"} for i, source in enumerate(sources)],
            "out": folder / "store",
            "memory_budget": "256MB",
            "force": True,
            "progress": False,
        }
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    extent = json.loads((store / "manifest.json").read_text())["extent"]
    figures = {
        "cpu": usage.ru_utime + usage.ru_stime - cpu,
        "wall": time.perf_counter() - wall,
        "peak_mb": usage.ru_maxrss / 1024,
        "disk": sum(file.stat().st_size for file in store.rglob("*") if file.is_file()),
        "activations": sum(coder["num_activations"] for coder in extent["coders"].values()),
    }
    print(json.dumps(figures))


def measure(tokens: int, width: int, coders: int) -> str:
    """Return one row of a table."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scaling", "--child", folder, *map(str, (tokens, width, coders))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    row = (
        f"| {tokens:,} | {width:,} | {coders} | {found['cpu']:.1f} | {tokens / found['cpu']:,.0f} | {found['wall']:.1f} "
        f"| {found['peak_mb']:.0f} | {found['disk'] / found['activations']:.2f} |"
    )
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), *map(int, args.child[1:]))
        return
    cases = [(tokens, BASE_WIDTH, 1) for tokens in TOKENS]
    cases += [(BASE_TOKENS, width, 1) for width in WIDTHS]
    cases += [(BASE_TOKENS, BASE_WIDTH, coders) for coders in CODERS[1:]]
    head = [
        "| tokens | width | coders | CPU-s | tokens per CPU-s | wall s | peak MB | bytes/activation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    load = f"Load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    rows = [measure(*case) for case in cases]
    if args.write:
        print(write_report("scaling", "\n".join([__doc__.split("\n\n", 1)[1], load, "", *head, *rows])))


if __name__ == "__main__":
    main()
