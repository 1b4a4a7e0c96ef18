"""The tables are a contract with readers: under one schema number a column may be added, never changed or dropped."""

import json
from pathlib import Path

import pytest

from autointerp import tables

FROZEN = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("version", range(max(1, tables.SCHEMA_VERSION - 1), tables.SCHEMA_VERSION + 1))
def test_columns_of_released_schemas_are_still_there(version):
    frozen = json.loads((FROZEN / f"schema-{version}.json").read_text())
    assert set(frozen) == {"plan", "explanations", "verdicts", "scores", "failures", "examples"}
    for name, columns in frozen.items():
        schema = getattr(tables, name.upper())
        found = {field.name: str(field.type) for field in schema}
        assert {column: found.get(column) for column in columns} == columns, name
        if version == tables.SCHEMA_VERSION:
            assert list(found) == list(columns), f"{name} has new columns; add them to {FROZEN / f'schema-{version}.json'}"


def test_every_table_is_keyed_by_coder_and_latent():
    for name in ("explanations", "verdicts", "scores", "failures", "examples"):
        assert getattr(tables, name.upper()).names[:2] == ["coder", "latent"]


def test_the_schema_number_lies_in_the_footer(tmp_path):
    import pyarrow.parquet as pq

    tables.write_parquet(tmp_path / "a.parquet", tables.PLAN.empty_table())
    metadata = pq.read_schema(tmp_path / "a.parquet").metadata
    assert metadata[b"autointerp.schema"] == str(tables.SCHEMA_VERSION).encode()
    newer = tables.PLAN.empty_table().replace_schema_metadata({"autointerp.schema": str(tables.SCHEMA_VERSION + 1)})
    pq.write_table(newer, tmp_path / "b.parquet")
    with pytest.raises(tables.StoreError, match="update autointerp"):
        tables.read_parquet(tmp_path / "b.parquet")
