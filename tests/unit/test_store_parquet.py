"""Columns of parquet files as numpy arrays."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autointerp.store.parquet import numbers


@pytest.mark.parametrize("kind", [np.uint32, np.int64, np.float16, np.float32, np.float64])
def test_numbers_of_slices_and_chunks(kind):
    values = np.arange(23).astype(kind)
    for column in (pa.array(values), pa.chunked_array([pa.array(values[:9]), pa.array(values[9:])])):
        found = numbers(column.slice(3, 17))
        assert found.dtype == kind and found.tolist() == values[3:20].tolist()
    assert len(numbers(pa.chunked_array([], pa.from_numpy_dtype(kind)))) == 0


def test_nulls_are_nan():
    column = pa.array([None, 1.5, None, *range(20), None], pa.float32())
    found = numbers(column.slice(1, 22))
    expected = np.array([1.5, np.nan, *range(20)], np.float32)
    assert found.dtype == np.float32 and np.array_equal(found, expected, equal_nan=True)


def test_a_column_is_read_without_pandas(tmp_path):
    pytest.importorskip("pandas")
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": pa.array([1.0, None]), "y": pa.array([1, 2])}), path)
    code = (
        "import sys; from pathlib import Path; from autointerp.store.parquet import numbers, read_table;"
        "table = read_table(Path(sys.argv[1])); numbers(table['x']); numbers(table['y']); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
