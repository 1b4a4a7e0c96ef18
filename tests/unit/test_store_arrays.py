"""Arrays written in blocks and mapped: the same numbers as numpy's, told where the file is another, and no more in memory than is used."""

import sys
from pathlib import Path

import numpy as np
import pytest

from autointerp.errors import StoreError
from autointerp.store.arrays import Blocks, forget_pages, mapped, write_blocks


def written(path, blocks, *, dtype, shape):
    with path.open("wb") as file:
        return write_blocks(file, blocks, dtype=dtype, shape=shape)


@pytest.mark.parametrize("sizes", [[], [3], [2, 0, 5]])
@pytest.mark.parametrize("rest", [(), (4,)])
def test_written_in_blocks_is_what_numpy_reads(tmp_path, sizes, rest):
    blocks = [np.random.default_rng(size).normal(size=(size, *rest)) for size in sizes]
    array = Blocks(dtype="<f4", shape=(sum(sizes), *rest), make=lambda: iter(blocks))
    path = tmp_path / "a.npy"
    assert written(path, array.make(), dtype=array.dtype, shape=array.shape) == sum(sizes)
    for found in (np.load(path), mapped(path, dtype=array.dtype, shape=array.shape), array.whole()):
        assert found.dtype == np.float32 and found.shape == array.shape
        np.testing.assert_array_equal(found, np.concatenate([np.zeros((0, *rest)), *blocks]).astype(np.float32))


@pytest.mark.parametrize("num_rows", [0, 4, 6])
def test_blocks_that_do_not_add_up_are_told(num_rows):
    array = Blocks(dtype="<f4", shape=(num_rows,), make=lambda: iter([np.zeros(2), np.zeros(3)]))
    with pytest.raises(StoreError, match=f"blocks of 5 rows were made for an array of {num_rows}"):
        array.whole()


@pytest.mark.parametrize("shape", [(29,), (31,), (30, 2), (0,)])
def test_a_file_of_another_size_is_told(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.arange(30))
    wanted = 128 + 8 * int(np.prod(shape))
    with pytest.raises(ValueError, match=f"it has 368 bytes; an array of <i8 and shape .* has {wanted}"):
        mapped(tmp_path / "a.npy", dtype="<i8", shape=shape)


def test_a_file_of_another_kind_is_told(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"PAR1" * 92)
    with pytest.raises(ValueError, match="it has 368 bytes"):
        mapped(tmp_path / "a.npy", dtype="<i8", shape=(30,))
    with pytest.raises(OSError, match="No such file"):
        mapped(tmp_path / "b.npy", dtype="<i8", shape=(30,))


def resident_file_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forgotten_pages_are_no_more_in_memory_and_are_read_again(tmp_path):
    numbers = np.arange(8 << 20, dtype=np.int64)
    np.save(tmp_path / "a.npy", numbers)
    array = mapped(tmp_path / "a.npy", dtype="<i8", shape=numbers.shape)
    before = resident_file_mb()
    assert array.sum() == numbers.sum()
    assert resident_file_mb() > before + 60
    forget_pages(array[5:])
    assert resident_file_mb() < before + 4
    np.testing.assert_array_equal(array, numbers)
    forget_pages(numbers)  # in memory: nothing happens
    assert numbers[-1] == len(numbers) - 1
