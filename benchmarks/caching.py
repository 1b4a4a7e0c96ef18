"""CPU time, memory and disk of caching: forward pass, forward and encode (two ways), the floor, this package, and delphi 0.1.3.

All of them run the same random GPT-NeoX weights, the same sparse coder and the same tokens (i.i.d. Zipf), each in a fresh
process, in one environment that has both packages (``--python``, see `incumbent`). Seconds are user + system CPU time of one thread, from the
moment model and coder are loaded until everything is on disk. Rounds are interleaved, ratios are taken within a round and
their median is reported, so that a busy machine does little harm. With ``--device cuda --dtype bfloat16`` the subject runs there in
that type and what is compared is wall time, the device waited for; delphi and the floor are left to the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.incumbent import Environment, cpu_seconds, peak_mb, tokenizer_of

CTX_LEN, K, VOCABULARY, SPLITS = 256, 32, 50304, 5
GROWTH_BUDGET = "256MB"
"""So small that the fewest tokens spill several runs already."""
KINDS = ("forward", "encode", "own-encode", "floor", "ours-ids", "ours", "delphi")
"""``encode`` is torch's own topk over all latents, ``own-encode`` this package's ``Coder.encode``: the harder denominator.
``ours-ids`` starts where all but ``ours`` do, from token ids and a coder in memory; ``ours`` reads the coder's files and
tokenises the text, which is what a user waits for."""


@dataclass(frozen=True)
class Case:
    """A model, a coder on it and how much is cached."""

    layers: int
    d_model: int
    hook: str
    width: int
    tokens: int


@dataclass(frozen=True)
class Setup:
    """Where and in what type the subject runs, and how many contexts at once."""

    device: str
    dtype: str
    batch: int

    @property
    def is_plain(self) -> bool:
        return self.device == "cpu" and self.dtype == "float32"

    @property
    def clock(self) -> str:
        """What is compared: processor time, or the time on the wall where a device does the work."""
        return "cpu" if self.device == "cpu" else "wall"


CASES = {
    "small-16k": Case(2, 128, "layers.1", 16384, 98304),
    "big-16k": Case(6, 512, "layers.3", 16384, 16384),
    "big-65k": Case(6, 512, "layers.3", 65536, 8192),
}


# What the children run ------------------------------------------------------------------------------------------------


def load_inputs(folder: Path, tokens: int, setup: Setup) -> tuple[Any, dict[str, Any], Any]:
    """Return model, coder tensors and int64 [sequences, 256] token ids."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "model", dtype=getattr(torch, setup.dtype)).eval().to(setup.device)
    ids = torch.from_numpy(np.load(folder / "tokens.npy")[: tokens // CTX_LEN].astype("int64"))
    coder = load_file(next((folder / "coder").glob("*/sae.safetensors")), device=setup.device)
    return model, coder, ids.to(setup.device)


def reference(folder: Path, tokens: int, out: Path, kind: str, setup: Setup) -> Iterator[None]:
    """Forward, forward and encode (with torch's own topk or our coder), or that and a compact store of numpy arrays."""
    import numpy as np
    import torch

    model, coder, ids = load_inputs(folder, tokens, setup)
    hook = next((folder / "coder").iterdir()).name
    own = None
    if kind == "own-encode":
        from autointerp.coders.load import load_coder

        own = load_coder(str(folder / "coder" / hook)).to(setup.device)
    seen: dict[str, Any] = {}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen["x"] = output[0] if isinstance(output, tuple) else output

    if kind != "forward":
        model.get_submodule(hook).register_forward_hook(keep)
    kept = []
    yield
    with torch.no_grad():
        for start in range(0, len(ids), setup.batch):
            model(ids[start : start + setup.batch])
            if kind == "forward":
                continue
            if own is not None:
                own.encode(seen["x"].flatten(0, 1))
                continue
            x = seen["x"].flatten(0, 1).float() - coder["b_dec"]
            pre = torch.nn.functional.linear(x, coder["encoder.weight"], coder["encoder.bias"]).relu()
            values, latents = pre.topk(K, dim=1, sorted=False)
            if kind == "floor":
                positions = torch.arange(start * CTX_LEN, start * CTX_LEN + len(x), dtype=torch.int32)
                positive = values > 0
                kept.append((latents[positive].int(), positions[:, None].expand_as(latents)[positive], values[positive].half()))
    if setup.device != "cpu":
        torch.accelerator.synchronize()
    if kind == "floor":
        latents, positions, values = (torch.cat(column).numpy() for column in zip(*kept, strict=True))
        order = np.argsort(latents, kind="stable")
        np.save(out / "positions.npy", positions[order])
        np.save(out / "values.npy", values[order])
        np.save(out / "starts.npy", np.cumsum(np.bincount(latents)))


def ours(folder: Path, tokens: int, out: Path, kind: str, setup: Setup) -> Iterator[None]:
    """The ``cache`` job, from the text on, or from token ids and a loaded coder."""
    from autointerp.jobs import cache as job
    from autointerp.jobs.signals import StopFlag

    hook = next((folder / "coder").iterdir()).name
    config = job.CacheConfig.parse(
        {
            "subject": str(folder / "model"),
            "corpus": {"source": str(folder / "corpus.jsonl"), "num_tokens": tokens, "ctx_len": CTX_LEN},
            "coders": [{"name": "sae", "source": str(folder / "coder" / hook)}],
            "out": str(out),
            "batch_tokens": setup.batch * CTX_LEN,
            "device": setup.device,
            "dtype": setup.dtype,
            "memory_budget": os.environ.get("BENCHMARK_BUDGET", "1GB"),
            "progress": False,
        },
        where="benchmark",
    )
    work = job._Job(config, StopFlag())
    if kind == "ours-ids":
        contexts = list(work._corpus.contexts())
        work._corpus.contexts = lambda: iter(contexts)
        reading = job.reading_of(config.coders[0], work._subject)
        job.reading_of = lambda *_: reading
    yield
    work.run()


def delphi(folder: Path, tokens: int, out: Path, kind: str, setup: Setup) -> Iterator[None]:
    """delphi's cache as its own `populate_cache` runs it: run, then save_splits."""
    from functools import partial

    from delphi.latents.cache import LatentCache
    from delphi.sparse_coders.load_sparsify import sae_dense_latents
    from sparsify import SparseCoder

    model, _, ids = load_inputs(folder, tokens, setup)
    hook = next((folder / "coder").iterdir()).name
    encode = partial(sae_dense_latents, sae=SparseCoder.load_from_disk(folder / "coder" / hook))
    yield
    cache = LatentCache(model, {hook: encode}, batch_size=setup.batch)
    cache.run(tokens, ids)
    cache.save_splits(n_splits=SPLITS, save_dir=out)


RUN: dict[str, Callable[[Path, int, Path, str, Setup], Iterator[None]]] = {
    "forward": reference, "encode": reference, "own-encode": reference, "floor": reference, "ours-ids": ours, "ours": ours,
    "delphi": delphi,
}  # fmt: skip


def child(kind: str, folder: Path, tokens: int, setup: Setup) -> None:
    """Run one kind in this process and print what it took."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name)
        steps = RUN[kind](folder, tokens, out, kind, setup)
        next(steps)
        base = peak_mb()
        cpu, wall = cpu_seconds(), time.perf_counter()
        next(steps, None)
        figures = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "base_mb": base}
        figures["peak_mb"] = peak_mb()
        figures["disk"] = float(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))
        print(json.dumps(figures))


# What the parent does -------------------------------------------------------------------------------------------------


def prepare(folder: Path, case: Case, tokens: int) -> None:
    """Write model, coder, tokens and the text that our tokenizer turns into these tokens. Needs the other environment."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=case.d_model, num_hidden_layers=case.layers, num_attention_heads=case.d_model // 64,
        intermediate_size=4 * case.d_model, max_position_embeddings=CTX_LEN, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    words = [f"w{index}" for index in range(VOCABULARY)]
    tokenizer_of(words).save_pretrained(folder / "model")
    coder = folder / "coder" / case.hook
    coder.mkdir(parents=True)
    weight = torch.randn(case.width, case.d_model)
    weight /= weight.norm(dim=1, keepdim=True)
    tensors = {
        "encoder.weight": weight, "encoder.bias": 0.01 * torch.randn(case.width),
        "W_dec": weight / 4,  # so that random directions reconstruct better than the mean does, as `cache` demands
        "b_dec": 0.01 * torch.randn(case.d_model),
    }  # fmt: skip
    save_file(tensors, coder / "sae.safetensors")
    settings = {"d_in": case.d_model, "num_latents": case.width, "k": K, "expansion_factor": case.width // case.d_model}
    (coder / "cfg.json").write_text(json.dumps(settings))
    rank = np.arange(1, VOCABULARY + 1)
    random = np.random.default_rng(0)
    ids = random.choice(VOCABULARY, size=(tokens // CTX_LEN, CTX_LEN), p=(1 / rank) / (1 / rank).sum())
    np.save(folder / "tokens.npy", ids.astype(np.uint16))
    with (folder / "corpus.jsonl").open("w") as file:
        for row in ids:
            file.write(json.dumps({"text": " ".join(map(words.__getitem__, row))}) + "\n")


class Runner:
    """Starts children in the other environment."""

    def __init__(self, python: str, folder: Path, setup: Setup) -> None:
        self._environment, self._folder, self.setup = Environment(python, folder), folder, setup
        self._settings = ["--device", setup.device, "--dtype", setup.dtype, "--batch", str(setup.batch)]

    def prepare(self, name: str, tokens: int) -> Path:
        folder = self._folder / name
        folder.mkdir()
        self._environment.run("caching", "--prepare", name, "--folder", folder, "--tokens", tokens, *self._settings)
        return folder

    def run(self, kind: str, folder: Path, tokens: int) -> dict[str, float]:
        return self._environment.figures("caching", "--child", kind, "--folder", folder, "--tokens", tokens, *self._settings)


def case_table(runner: Runner, name: str, rounds: int, tokens: int, kinds: tuple[str, ...]) -> list[str]:
    """Measure one case and return its table."""
    case, setup, clock = CASES[name], runner.setup, runner.setup.clock
    folder = runner.prepare(name, tokens)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds:
            found[kind].append(figures := runner.run(kind, folder, tokens))
            print(f"{name} round {number + 1} {kind}: {figures[clock]:.2f} {clock} s", file=sys.stderr, flush=True)

    def ratio(kind: str, other: str) -> str:
        if kind not in found or other not in found:
            return "-"
        values = [a[clock] / b[clock] for a, b in zip(found[kind], found[other], strict=True)]
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    lines = [
        f"## {name}: {case.layers} layers, d {case.d_model}, hook {case.hook}, width {case.width}, TopK {K}, {tokens:,} tokens"
        + ("" if setup.is_plain else f", subject on {setup.device} in {setup.dtype}, {setup.batch * CTX_LEN:,} tokens at once"),
        "",
        f"| | CPU-s (median) | wall s | tokens per {'CPU-s' if clock == 'cpu' else 's'} | over forward | over forward + torch's topk | over forward + our encode "
        "| incumbent over it | peak MB (base) | bytes/activation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        cpu, wall, peak, base, disk = (
            statistics.median(row[key] for row in found[kind]) for key in ("cpu", "wall", "peak_mb", "base_mb", "disk")
        )
        size = f"{disk / tokens / K:.2f}" if disk else "-"
        lines.append(
            f"| {kind} | {cpu:.2f} | {wall:.2f} | {tokens / (cpu if clock == 'cpu' else wall):,.0f} | {ratio(kind, 'forward')} | {ratio(kind, 'encode')} | {ratio(kind, 'own-encode')} "
            f"| {ratio('delphi', kind)} | {peak:.0f} ({base:.0f}) | {size} |"
        )
    return lines


def growth_table(runner: Runner, sizes: list[int]) -> list[str]:
    """Measure the growth of our peak memory on the small case."""
    os.environ["BENCHMARK_BUDGET"] = GROWTH_BUDGET
    folder = runner.prepare("small-16k", max(sizes))
    peaks = []
    for tokens in sizes:
        peaks.append(figures := runner.run("ours", folder, tokens))
        print(f"{tokens} tokens: {figures}", file=sys.stderr, flush=True)
    lines = [
        "## Peak memory of ours, small-16k",
        "",
        "| tokens | peak MB | base MB | CPU-s | bytes/activation |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {tokens:,} | {row['peak_mb']:.0f} | {row['base_mb']:.0f} | {row['cpu']:.0f} | {row['disk'] / tokens / K:.2f} |"
        for tokens, row in zip(sizes, peaks, strict=True)
    ]
    return [*lines, "", f"Growth: {peaks[-1]['peak_mb'] - peaks[0]['peak_mb']:+.0f} MB."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="python of the environment that has delphi too")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--no-delphi", action="store_true", help="leave delphi out; this package's own environment will do")
    parser.add_argument("--device", default="cpu", help="such as cuda: the subject's, of forward, encode and ours")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the subject")
    parser.add_argument("--batch", type=int, help="contexts in a forward pass; by default 8, and 32 on a device")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="in place of the case's own number")
    parser.add_argument("--growth", nargs="+", type=int, default=[], help="tokens at which to measure our peak memory")
    parser.add_argument("--write", action="store_true", help="leave a dated report")
    for name in ("child", "prepare", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    setup = Setup(args.device, args.dtype, args.batch or (8 if args.device == "cpu" else 32))
    if args.prepare:
        prepare(Path(args.folder), CASES[args.prepare], args.tokens)
    elif args.child:
        child(args.child, Path(args.folder), args.tokens, setup)
    else:
        from benchmarks.reporting import write_report

        left_out = () if setup.is_plain else ("delphi", "floor")
        kinds = tuple(kind for kind in args.kinds if kind not in left_out and not (args.no_delphi and kind == "delphi"))
        lines = [" ".join(__doc__.split("\n\n")[1].split())]
        with tempfile.TemporaryDirectory() as name:
            if "delphi" in kinds:
                lines += ["", f"Environment: {Environment(args.python, Path(name)).versions()}."]
            runner = Runner(args.python, Path(name), setup)
            for case in args.cases:
                lines += ["", *case_table(runner, case, args.rounds, args.tokens or CASES[case].tokens, kinds)]
        if args.growth:
            with tempfile.TemporaryDirectory() as name:
                lines += ["", *growth_table(Runner(args.python, Path(name), setup), args.growth)]
        print("\n".join(lines))
        if args.write:
            print(write_report("caching", "\n".join(lines)))


if __name__ == "__main__":
    main()
