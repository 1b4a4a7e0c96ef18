"""The snippets of docs/store.md run on a store, and say of it what the reader says."""

import re
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from autointerp.store.reader import open_store
from tests.integration.test_jobs_store import build_store

PAGE = Path(__file__).parents[2] / "docs" / "store.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
ACTIVATIONS = "cache/demo/coders/coder=sae/activations"


@pytest.fixture
def coder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    build_store(tmp_path / "cache" / "demo")
    return open_store("cache/demo").coder("sae")


def test_every_snippet_runs(coder, capsys):
    assert len(SNIPPETS) == 5
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    # Latent 17 fires on the word 17 and nowhere else.
    assert "word17" in printed and f"{len(coder.activations(17)[0])}" in printed


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
