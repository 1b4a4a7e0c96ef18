"""The snippets of docs/store.md run on a store, and say of it what the reader says."""

import re
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from autointerp.jobs.tables import TablesConfig, build_tables
from autointerp.store.logits import LOGITS, TokenLogits, write_logits
from autointerp.store.neighbours import NEIGHBOURS
from autointerp.store.reader import open_store
from autointerp.store.statistics import STATISTICS
from tests.integration.test_jobs_store import build_store

PAGE = Path(__file__).parents[2] / "docs" / "store.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
ACTIVATIONS = "cache/demo/coders/coder=sae/activations"


class Letters:
    """Counts digits."""

    id = "digits"

    def embed(self, texts):
        counts = np.array([[1 + text.count(digit) for digit in "0123456789"] for text in texts], np.float32).reshape(-1, 10)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def coder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    build_store(tmp_path / "cache" / "demo")
    store = open_store("cache/demo")
    config = TablesConfig(
        store="cache/demo",
        statistics=True,
        neighbours=("cooccurrence",),
        embedder=f"{__name__}:Letters",
        window=16,
        min_window=8,
    )
    assert len(list(build_tables(config, progress=False))) == 3
    reader = store.coder("sae")
    ids, values = np.tile(np.arange(3, dtype=np.uint32), (reader.width, 1)), np.ones((reader.width, 3), np.float32)
    write_logits(store, "sae", [TokenLogits(promoted=ids, promoted_logits=values, suppressed=ids, suppressed_logits=-values)])
    return reader


def test_every_snippet_runs(coder, capsys):
    assert len(SNIPPETS) == 6
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    # Latent 17 fires on the word 17 and nowhere else.
    assert "word17" in printed and f"{len(coder.activations(17)[0])}" in printed
    assert "[(' word17', 1.0)] 0.0 bits" in printed and "promotes [' word0', ' word1', ' word2']" in printed
    assert "windows most like the first" in printed


@pytest.mark.parametrize("schema", [STATISTICS, LOGITS, NEIGHBOURS])
def test_the_tables_have_the_columns_that_the_page_names(schema):
    """Each column with its type, in a row of its own or with those of the same type."""
    described = {}
    for line in PAGE.read_text().partition("## Tables")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            described |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1])
    for field in schema:
        kind = str(field.type)
        name = re.sub(r"list<(?:element|item): (\w+)>", r"\1", kind).replace("float", "float32").replace("float3232", "float32")
        assert name in described[field.name] and ("list" in kind) == ("list" in described[field.name]), field


def test_others_read_the_same_numbers(coder, tmp_path):
    latents, positions, values = [], [], []
    for latent, at, strength in coder.sweep():
        latents.append(np.full(len(at), latent))
        positions.append(at)
        values.append(strength)
    assert str(pq.read_schema(next(Path(ACTIVATIONS).glob("*.parquet"))).field("activation").type) == "halffloat"
    wanted = [np.concatenate(column).tolist() for column in (latents, positions, values)]
    by_duckdb = (
        duckdb.connect()
        .execute(f"select latent, position, activation from '{ACTIVATIONS}/*.parquet' order by latent, position")
        .fetchall()
    )
    by_pandas = pd.read_parquet(ACTIVATIONS)
    by_datasets = load_dataset(
        "parquet", data_files=f"{ACTIVATIONS}/*.parquet", split="train", cache_dir=str(tmp_path / "datasets")
    ).to_pandas()
    assert [list(column) for column in zip(*by_duckdb, strict=True)] == wanted
    for frame in (by_pandas, by_datasets):
        assert [frame[name].tolist() for name in ("latent", "position", "activation")] == wanted
