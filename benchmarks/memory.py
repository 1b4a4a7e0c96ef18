"""Peak memory of ``autointerp cache`` against the number of tokens, each in a fresh process, and beside it that of delphi 0.1.3.

The memory budget is small enough that the smallest corpus already spills several runs; what is reported is the growth of the peak
resident set from the smallest corpus to the largest, which must not depend on the number of tokens.

``--tiny`` is for corpora beyond the standard library, whose source has some 4M tokens: a random subject (2 layers, d 32) and a
random coder of 4096 latents (JumpReLU, about 16 active), over the library's source and more of it with identifiers permuted.

``--python`` names an environment that has both packages (see `incumbent`), in which both then run, of one thread, on the same subject,
coder and tokens: the tiny subject of ``--tiny``, and 4096 latents in the format that delphi reads (TopK, 32 active). delphi runs as
its own `populate_cache` does, `run` and then `save_splits`, eight contexts at once as this package; up to ``--delphi-tokens``, since
what it holds grows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.billion import CTX_LEN, D_MODEL, HOOKPOINT
from benchmarks.incumbent import Environment
from benchmarks.reporting import write_report

CHILD = """
import json, sys, time
from benchmarks.incumbent import cpu_seconds, peak_mb
start = time.monotonic()
from autointerp.cli.main import main
try:
    main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code
figures = {"code": code, "peak_mb": peak_mb(), "seconds": time.monotonic() - start, "cpu": cpu_seconds()}
open(sys.argv[1], "w").write(json.dumps(figures))
"""
WIDTH, K, BATCH = 4096, 32, 8


BUNDLED = ["--subject", "bundled:model", "--coder", "sae=bundled:sae", "--coder", "skip-transcoder=bundled:skip-transcoder"]


def tiny(folder: Path, tokens: int) -> list[str]:
    """Write corpus, subject and coder, in another process; return what names them."""
    command = [sys.executable, "-m", "benchmarks.billion", "--child", "prepare", str(folder)]
    subprocess.run([*command, "--tokens", str(tokens), "--width", str(WIDTH), "--l0", "16"], check=True)
    return _inputs(folder, folder / "coder", HOOKPOINT)


def _inputs(folder: Path, coder: Path, hookpoint: str) -> list[str]:
    corpus = ["--corpus", str(folder / "corpus.jsonl"), "--ctx-len", str(CTX_LEN), "--force"]
    return [*corpus, "--subject", str(folder / "subject"), "--coder", f"sae={coder}@@{hookpoint}"]


def both(folder: Path, tokens: int) -> list[str]:
    """Write corpus, subject and a coder that both packages read, laid out as `caching` wants it; return what names them."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.billion import write_subject

    write_subject(folder, tokens=tokens)
    (folder / "model").symlink_to("subject")
    coder = folder / "coder" / HOOKPOINT.partition("@")[0]
    coder.mkdir(parents=True)
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(WIDTH, D_MODEL))
    zeros = {"encoder.bias": torch.zeros(WIDTH), "b_dec": torch.zeros(D_MODEL)}
    save_file(zeros | {"encoder.weight": weight, "W_dec": weight.clone()}, coder / "sae.safetensors")
    settings = {"d_in": D_MODEL, "num_latents": WIDTH, "k": K, "expansion_factor": WIDTH // D_MODEL}
    (coder / "cfg.json").write_text(json.dumps(settings))
    return _inputs(folder, coder, HOOKPOINT)


def measure(python: str, tokens: int, budget: str, inputs: list[str], folder: Path) -> dict[str, float]:
    """Cache `tokens` tokens; return peak MB, seconds and the number of runs."""
    out = folder / f"store-{tokens}"
    result = folder / f"{tokens}.json"
    command = ["-q", "cache", *inputs, "--tokens", str(tokens), "--memory-budget", budget, "--out", str(out)]
    subprocess.run([python, "-c", CHILD, str(result), *command], check=True)
    figures: dict[str, float] = json.loads(result.read_text())
    if figures["code"]:
        raise SystemExit(f"cache ended with exit code {figures['code']}")
    manifest = json.loads((out / "manifest.json").read_text())
    figures["runs"] = manifest["provenance"]["num_runs"]
    figures["tokens"] = manifest["extent"]["num_tokens"]
    figures["activations"] = sum(coder["num_activations"] for coder in manifest["extent"]["coders"].values())
    return figures


def measure_delphi(environment: Environment, inputs: Path, store: Path, tokens: int) -> dict[str, float]:
    """Cache the tokens that a store holds with delphi; return peak MB and seconds."""
    environment.run("memory", "--child", "tokens", store, inputs / "tokens.npy")
    return environment.figures("caching", "--child", "delphi", "--folder", inputs, "--tokens", tokens)


def child(kind: str, *arguments: str) -> None:
    """Prepare, or save a store's tokens as int [contexts, 256], in a process that is then gone."""
    import numpy as np

    if kind == "both":
        print(json.dumps(both(Path(arguments[0]), int(arguments[1]))))
    else:
        from autointerp.store import open_store

        np.save(arguments[1], open_store(arguments[0]).tokens.reshape(-1, CTX_LEN))


def growth(rows: list[tuple[int, float]]) -> str:
    """Return the growth of the second over millions of the first, in words."""
    megabytes, millions = rows[-1][1] - rows[0][1], (rows[-1][0] - rows[0][0]) / 1e6
    return f"{megabytes:+.1f} MB over {millions:.1f}M tokens, {megabytes / millions:+.2f} MB per million"


def compare(python: str, sizes: list[int], most: int, budget: str) -> list[str]:
    """Measure both packages; return the lines of the report."""
    ours: list[tuple[int, float]] = []
    delphi: list[tuple[int, float]] = []
    lines = [
        "| tokens | activations | ours, peak MB | delphi, peak MB (base) | delphi over ours | ours, CPU-s, all | delphi, CPU-s once loaded | runs spilled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, inputs = Path(name), Path(name) / "inputs"
        environment = Environment(python, folder)
        arguments = json.loads(environment.run("memory", "--child", "both", inputs, max(sizes)).splitlines()[-1])
        versions = environment.versions()
        for tokens in sizes:
            mine = measure(python, tokens, budget, arguments, folder)
            ours.append((tokens, mine["peak_mb"]))
            theirs = "- | - | "
            cpu = "-"
            if tokens <= most:
                other = measure_delphi(environment, inputs, folder / f"store-{tokens}", tokens)
                delphi.append((tokens, other["peak_mb"]))
                theirs = f"{other['peak_mb']:.0f} ({other['base_mb']:.0f}) | {other['peak_mb'] / mine['peak_mb']:.2f} | "
                cpu = f"{other['cpu']:.0f}"
            lines.append(
                f"| {mine['tokens']:,} | {mine['activations']:,} | {mine['peak_mb']:.0f} | {theirs}{mine['cpu']:.0f} | {cpu} | {mine['runs']} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", f"Growth of peak memory, ours: {growth(ours)} (goal: at most 20). Budget {budget}."]
    if len(delphi) > 1:
        shared = [row for row in ours if row[0] <= most]
        lines += ["", f"On the sizes that delphi ran too: ours {growth(shared)}; delphi {growth(delphi)}."]
        if len(delphi) > 2:
            lines += [f"From the last but one of them to the last: ours {growth(shared[-2:])}; delphi {growth(delphi[-2:])}."]
    return [*lines, "", " ".join(__doc__.split("\n\n")[3].split()), "", f"Environment: {versions}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, help="by default 200000 2000000; with --python 98304 to 10000384")
    parser.add_argument("--tiny", action="store_true", help="a tiny random subject and as much text as is wanted")
    parser.add_argument("--python", help="python of an environment that has delphi too: compare with it")
    parser.add_argument("--delphi-tokens", type=int, default=1_000_000, help="most tokens that delphi caches")
    parser.add_argument("--budget", default="100MB")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    os.environ["MALLOC_ARENA_MAX"] = "2"
    if args.python:
        os.environ["OMP_NUM_THREADS"] = "1"
        sizes = args.tokens or [98_304, 399_360, 999_424, 10_000_384]
        if wrong := [size for size in sizes if size % (BATCH * CTX_LEN)]:
            raise SystemExit(
                f"{wrong[0]} tokens are no whole number of batches of {BATCH * CTX_LEN}, of which delphi drops the rest"
            )
        lines = compare(args.python, sizes, args.delphi_tokens, args.budget)
    else:
        lines = alone(args.tokens or [200_000, 2_000_000], args.budget, is_tiny=args.tiny)
    lines += ["", f"Load average at the end {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores."]
    print("\n".join(lines))
    if args.write:
        print(write_report("memory", "\n".join(lines), suffix="-incumbent" if args.python else "-tiny" if args.tiny else ""))


def alone(sizes: list[int], budget: str, *, is_tiny: bool) -> list[str]:
    """Measure this package; return the lines of the report."""
    lines = ["| tokens | runs spilled | peak resident MB | seconds |", "|---|---|---|---|"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = tiny(Path(folder) / "inputs", max(sizes)) if is_tiny else BUNDLED
        for tokens in sizes:
            figures = measure(sys.executable, tokens, budget, inputs, Path(folder))
            rows.append((tokens, figures["peak_mb"]))
            lines.append(f"| {tokens:,} | {figures['runs']} | {figures['peak_mb']:.1f} | {figures['seconds']:.1f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", f"Growth of peak memory: {growth(rows)} (goal: at most 20). Budget {budget}."]
    return [*lines, "", " ".join(__doc__.split("\n\n")[2].split())] if is_tiny else lines


if __name__ == "__main__":
    main()
