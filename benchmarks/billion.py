"""A store of a billion activations: built, verified and read whole, each in a process of its own under a memory limit.

The store is built by ``autointerp cache`` as a user would: tokeniser, forward pass of a subject, encoder, spilled runs, merge.
Subject and coder are random and small (2 layers, d 32), the coder in a published format (JumpReLU) at full width, its thresholds
set so that the latents' firing rates are log-normal over latents; what is measured is the scale, not what is found. The text is the
standard library's source and, beyond it, the same with identifiers permuted by a seed. Then ``autointerp verify --contents``, and a
sweep that reads every latent in order and compares the number of activations with what the store says of itself.

``--interrupt`` builds a smaller store twice, once killed by SIGKILL at five moments drawn at random, and compares every table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.limits import disk_bytes, run_limited, why_no_limit
from benchmarks.reporting import write_report

CTX_LEN, D_MODEL, LAYERS, HOOKPOINT = 256, 32, 2, "layers.1@out"
SAMPLE_CONTEXTS = 16
"""Contexts on which thresholds are set."""
SAMPLE_TOKENS = 1_000_000
"""Tokens over which these contexts are spread."""
MOST_FIRING = 256
"""Tokens of the sample on which a latent fires at most."""
SIGMA = 1.2
"""Of the logarithm of firing rates."""
CHARS_PER_TOKEN = 6
"""More than there are, so that the text does not run out."""
KILLS = 5
LOADING_CPU_S = 6.0
"""What a life spends on imports, subject and coder, about."""
CLI = "from autointerp.cli.main import main; main()"


# What is prepared ----------------------------------------------------------------------------------------------------


def prepare(folder: Path, *, tokens: int, width: int, l0: float) -> None:
    """Write corpus, subject and coder to `folder`."""
    documents = write_subject(folder, tokens=tokens)
    write_coder(folder, width=width, l0=l0)
    (folder / "inputs.json").write_text(json.dumps({"documents": documents, "tokens": tokens, "width": width, "l0": l0}))


def write_subject(folder: Path, *, tokens: int) -> int:
    """Write corpus and subject to `folder`; return how many documents there are."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from autointerp.demo import bundled
    from benchmarks.corpus import write_corpus

    folder.mkdir(parents=True, exist_ok=True)
    documents = write_corpus(folder / "corpus.jsonl", num_chars=tokens * CHARS_PER_TOKEN)
    tokenizer = AutoTokenizer.from_pretrained(bundled("model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, intermediate_size=2 * D_MODEL, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=2 * CTX_LEN,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "subject")
    tokenizer.save_pretrained(folder / "subject")
    return documents


def write_coder(folder: Path, *, width: int, l0: float) -> None:
    """Write a JumpReLU coder of random directions, each with the threshold that gives it its rate on a sample of the corpus."""
    import numpy as np
    import torch

    from autointerp.subject.corpus import Corpus, CorpusConfig
    from autointerp.subject.hooks import read_hookpoints
    from autointerp.subject.model import load_subject

    subject = load_subject(str(folder / "subject"), device="cpu")
    hookpoint = subject.resolve(HOOKPOINT)
    config = CorpusConfig(source=str(folder / "corpus.jsonl"), ctx_len=CTX_LEN, num_tokens=SAMPLE_TOKENS)
    contexts = [
        context.tokens for context in Corpus(config, subject.tokenizer, num_embeddings=subject.num_embeddings).contexts()
    ]
    chosen = contexts[:: max(1, len(contexts) // SAMPLE_CONTEXTS)][:SAMPLE_CONTEXTS]
    tokens = torch.from_numpy(np.stack([tokens for tokens in chosen if len(tokens) == CTX_LEN]).astype(np.int64))
    with_bos = torch.cat([torch.full((len(tokens), 1), subject.bos_id), tokens], dim=1)
    x_ND = read_hookpoints(subject.model, with_bos, [hookpoint])[hookpoint][:, 1:].flatten(0, 1).float()

    draw = np.random.default_rng(0)
    rows = draw.standard_normal((width, D_MODEL), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = draw.lognormal(0, SIGMA, width)
    # Scaled so that the mean is l0 / width after the cut, and rounded at random so that rare latents keep their rates.
    scale = 1.0
    for _ in range(20):
        scale *= l0 / width * len(x_ND) / np.minimum(wanted * scale, MOST_FIRING).mean()
    ranks = np.floor(np.minimum(wanted * scale, MOST_FIRING) + draw.random(width)).astype(np.int64)
    bias = -torch.from_numpy(rows) @ x_ND.mean(dim=0)
    threshold = torch.empty(width)
    for first in range(0, width, 2048):
        part = slice(first, first + 2048)
        best = (torch.from_numpy(rows[part]) @ x_ND.T + bias[part, None]).topk(MOST_FIRING + 2, dim=1).values
        above = torch.from_numpy(ranks[part])[:, None]
        threshold[part] = best.gather(1, above)[:, 0]
    folder = folder / "coder"
    folder.mkdir(exist_ok=True)
    np.savez(
        folder / "params.npz", W_enc=rows.T.copy(), W_dec=rows, b_enc=bias.numpy(), b_dec=x_ND.mean(dim=0).numpy(),
        threshold=threshold.clamp(min=0).numpy(),
    )  # fmt: skip


# What runs under the limit -------------------------------------------------------------------------------------------


def cache_command(inputs: Path, store: Path, *, tokens: int, budget: str | None) -> list[str]:
    """Return the command line that builds the store."""
    command = [
        sys.executable,
        "-c",
        CLI,
        "cache",
        "--subject",
        str(inputs / "subject"),
        "--corpus",
        str(inputs / "corpus.jsonl"),
    ]
    command += ["--coder", f"jumprelu={inputs / 'coder'}@@{HOOKPOINT}", "--tokens", str(tokens), "--ctx-len", str(CTX_LEN)]
    command += ["--force", "--out", str(store)]  # the coder was never trained, and `cache` would say so
    return command + (["--memory-budget", budget] if budget else [])


def sweep(store: Path, result: Path) -> None:
    """Read every latent in order, and write what was found."""
    import numpy as np

    from autointerp.store.reader import open_store

    reader = open_store(store).coder("jumprelu")
    counts = np.zeros(reader.width, np.int64)
    total, last_position = 0.0, -1
    for latent, positions, values in reader.sweep():
        counts[latent] = len(positions)
        total += float(values.sum(dtype=np.float64))
        last_position = max(last_position, int(positions[-1]))
    found = {
        "activations": int(counts.sum()),
        "as_stored": int(counts.sum()) == reader.num_activations and bool((counts == reader.latents["count"]).all()),
        "live": int((counts > 0).sum()),
        "most": int(counts.max()),
        "median": float(np.median(counts)),
        "mean_value": total / counts.sum(),
        "last_position": last_position,
    }
    result.write_text(json.dumps(found))


# What is reported ----------------------------------------------------------------------------------------------------


class Bench:
    """The steps, each recorded in the folder when it is done, so that a benchmark started again goes on."""

    def __init__(self, folder: Path, *, limit_bytes: int | None, threads: int) -> None:
        self.folder = folder.absolute()
        self.inputs = self.folder / "inputs"
        self._limit = limit_bytes
        names = ("OMP", "MKL", "OPENBLAS")
        self._environment = os.environ | {f"{name}_NUM_THREADS": str(threads) for name in names}
        self._environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(Path(__file__).parents[1])}
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, *, tokens: int, width: int, l0: float) -> None:
        """Write the inputs where they are not there; without a limit."""
        if not (self.inputs / "inputs.json").exists():
            arguments = ["--tokens", str(tokens), "--width", str(width), "--l0", str(l0)]
            self.run("prepare", [*_this("prepare", self.inputs), *arguments], limited=False)
        there = json.loads((self.inputs / "inputs.json").read_text())
        if (there["width"], there["l0"]) != (width, l0) or there["tokens"] < tokens:
            raise SystemExit(f"{self.inputs} was made for {there}; name another --folder")

    def run(
        self, step: str, command: list[str], *, limited: bool = True, watched: dict[str, Path] | None = None
    ) -> dict[str, Any]:
        """Run a step unless it is recorded; return its figures."""
        record = self.folder / f"{step}.json"
        if not record.exists():
            print(f"{time.strftime('%H:%M:%S')} {step}", flush=True)
            log = self.folder / f"{step}.log"
            used = run_limited(
                command,
                limit_bytes=self._limit if limited else None,
                environment=self._environment,
                log=log,
                watched=watched or {},
            )
            print(f"{time.strftime('%H:%M:%S')} {step}: {json.dumps(used.values())}", flush=True)
            if used.exit_code:
                raise SystemExit(f"{step} ended with exit code {used.exit_code}; see {log}:\n{log.read_text()[-2000:]}")
            record.write_text(json.dumps(used.values() | {"load": os.getloadavg()[1]}))
        figures: dict[str, Any] = json.loads(record.read_text())
        return figures

    def killed(self, step: str, command: list[str], cpu_s: float) -> bool:
        """Run a command and kill it after so many CPU-s, whatever else the machine does; return whether it still ran then."""
        log = self.folder / f"{step}.log"
        used = run_limited(
            command, limit_bytes=self._limit, environment=self._environment, log=log, watched={}, kill_after_cpu_s=cpu_s
        )
        if used.exit_code not in (0, -9):
            raise SystemExit(f"{step} ended with exit code {used.exit_code}; see {log}:\n{log.read_text()[-2000:]}")
        return used.exit_code == -9


def _this(child: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.billion", "--child", child, *(str(argument) for argument in arguments)]


def measure(bench: Bench, *, tokens: int, budget: str | None) -> list[str]:
    """Build, verify and sweep the store; return the lines of the report."""
    from benchmarks.reading import drop_from_page_cache

    store = bench.folder / "store"
    watched = {"runs": store / "building" / "runs", "store": store}
    steps = {"build": bench.run("build", cache_command(bench.inputs, store, tokens=tokens, budget=budget), watched=watched)}
    for step, command in {
        "verify": [sys.executable, "-c", CLI, "verify", "--contents", str(store)],
        "sweep": _this("sweep", store, bench.folder / "found.json"),
    }.items():
        drop_from_page_cache(store)
        steps[step] = bench.run(step, command)
    manifest = json.loads((store / "manifest.json").read_text())
    found = json.loads((bench.folder / "found.json").read_text())
    coder = manifest["extent"]["coders"]["jumprelu"]
    num, width, stored_tokens = coder["num_activations"], coder["width"], manifest["extent"]["num_tokens"]
    if not found["as_stored"]:
        raise SystemExit(f"the sweep found {found['activations']:,} activations and the store says {num:,}")
    size, disk = disk_bytes(store), steps["build"]["peak_disk"]
    parts = disk_bytes(store / "coders" / "coder=jumprelu" / "activations")
    limit = steps["build"]["limit_mb"]
    told = (
        f"{limit:,.0f} MB for each step, set from outside by a control group"
        if limit
        else f"none, since {why_no_limit() or 'none was wanted'}"
    )
    lines = [
        f"**{num:,} activations** of {width:,} latents on {stored_tokens:,} tokens (L0 {num / stored_tokens:.0f}); "
        f"{found['live']:,} latents fire, the median one {found['median']:,.0f} times, the most frequent {found['most']:,} times. "
        f"{manifest['provenance']['num_runs']} runs, {coder['num_parts']} parts, values in {coder['dtype']}.",
        "",
        f"Memory limit: {told}; memory budget of the job: {budget or 'the default, 1 GiB'}.",
        "",
        "| step | seconds | CPU-s | anonymous memory, peak MB | with page cache, peak MB | rate | load |",
        "|---|---|---|---|---|---|---|",
    ]
    for step, row in steps.items():
        rate = f"{stored_tokens / row['seconds']:,.0f} tokens/s, " if step == "build" else ""
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"
        lines.append(
            f"| {step} | {row['seconds']:,.0f} | {row['cpu_seconds']:,.0f} | {row['anonymous_mb']:,.0f} | {peak} "
            f"| {rate}{num / row['seconds'] / 1e6:.2f}M activations/s | {row['load']:.1f} |"
        )
    lines += [
        "",
        f"Disk: {disk['runs'] / 1e9:.2f} GB of runs at their peak ({disk['runs'] / num:.2f} bytes per activation), "
        f"{disk['store'] / 1e9:.2f} GB in all at the peak, {size / 1e9:.2f} GB in the end: {size / num:.2f} bytes per activation, "
        f"{parts / num:.2f} of them for the activations themselves.",
        "",
        f"`verify --contents` found no problem; the sweep found all {found['activations']:,} activations, as many of each latent as "
        "`latents.parquet` says. CPU-s are user and system time of the step; the load average is that of five minutes at its end, "
        f"on {os.cpu_count()} cores. Page cache counts against the limit and is taken back by the kernel when the limit is met, so "
        "that its peak is the limit wherever more is read or written; anonymous memory cannot be taken back.",
    ]
    return lines


def interrupt(bench: Bench, *, tokens: int, seed: int) -> list[str]:
    """Build twice, once killed again and again; return the lines of the report."""
    whole, other = bench.folder / "whole", bench.folder / "interrupted"
    budget = "64MB"  # so small that there are many runs
    figures = bench.run("whole", cache_command(bench.inputs, whole, tokens=tokens, budget=budget))
    shutil.rmtree(other, ignore_errors=True)
    draw, moments, command = random.Random(seed), [], cache_command(bench.inputs, other, tokens=tokens, budget=budget)
    while len(moments) < KILLS:
        # So short that five lives rarely see the end.
        cpu_s = LOADING_CPU_S + draw.uniform(0.05, 0.2) * figures["cpu_seconds"]
        if bench.killed("interrupted", command, cpu_s):
            at = "merging" if (other / "building" / "corpus.json").exists() else "spilling"
            runs = len(list((other / "building" / "runs").glob("run-*.json")))
            what = f"{at} with {runs} runs committed" if other.exists() else "loading"
            moments.append(f"after {cpu_s:.1f} CPU-s, {what}")
        else:
            shutil.rmtree(other)  # it ended before its last kill: from the start again
            moments = []
    bench.killed("interrupted", command, float("inf"))
    names = sorted({path.relative_to(root) for root in (whole, other) for path in root.rglob("*.parquet")})
    differ = [str(name) for name in names if not _equal(whole / name, other / name)]
    manifest = json.loads((whole / "manifest.json").read_text())
    num, runs = manifest["extent"]["coders"]["jumprelu"]["num_activations"], manifest["provenance"]["num_runs"]
    if differ:
        raise SystemExit(f"these tables differ after {KILLS} kills: {', '.join(differ)}")
    return [
        "## Interrupted",
        "",
        f"{num:,} activations on {tokens:,} tokens in {runs} runs (budget {budget}), {figures['cpu_seconds']:.0f} CPU-s when left alone. "
        f"Built again and killed by SIGKILL {KILLS} times: {'; '.join(moments)}. All {len(names)} parquet files hold the same rows.",
    ]


def _equal(one: Path, other: Path) -> bool:
    """Return whether two parquet files are there and hold the same rows, compared a row group at a time."""
    import pyarrow.parquet as pq

    if not (one.is_file() and other.is_file()):
        return False
    with pq.ParquetFile(one) as a, pq.ParquetFile(other) as b:
        if a.num_row_groups != b.num_row_groups:
            return False
        return all(a.read_row_group(group).equals(b.read_row_group(group)) for group in range(a.num_row_groups))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("billion"), help="inputs, store and logs; 15 GB for a billion")
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--width", type=int, default=131_072)
    parser.add_argument("--l0", type=float, default=220, help="activations per token that the thresholds aim at")
    parser.add_argument("--memory-limit", type=float, default=2e9, help="bytes, by a control group; 0 for none")
    parser.add_argument("--budget", help="memory budget of the job, in place of its default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--interrupt", action="store_true", help="kill a build of --tokens and compare, in place of the rest")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *paths = args.child
        if kind == "prepare":
            prepare(Path(paths[0]), tokens=args.tokens, width=args.width, l0=args.l0)
        else:
            sweep(Path(paths[0]), Path(paths[1]))
        return
    bench = Bench(args.folder, limit_bytes=int(args.memory_limit) or None, threads=args.threads)
    bench.prepare(tokens=args.tokens, width=args.width, l0=args.l0)
    if args.interrupt:
        lines = interrupt(bench, tokens=args.tokens, seed=args.seed)
    else:
        lines = measure(bench, tokens=args.tokens, budget=args.budget)
    text = "\n".join([" ".join(paragraph.split()) + "\n" for paragraph in __doc__.split("\n\n")[:2]] + lines)
    print(text)
    (bench.folder / "report.md").write_text(text + "\n")
    if args.write:
        print(write_report("billion", text, suffix="-interrupted" if args.interrupt else ""))


if __name__ == "__main__":
    main()
