"""A store damaged anywhere: reading gives what was written or one sentence that names the file, never something else."""

import random
import shutil

import numpy as np
import pytest
from small_store import random_fires, small_store

from autointerp.errors import AutointerpError, StoreError
from autointerp.files import read_sealed, write_sealed
from autointerp.store import open_store, verify_store
from autointerp.store.contents import verify_contents
from autointerp.store.embeddings import IndexRecord, index_folder, write_index
from autointerp.store.logits import TokenLogits, read_logits, write_logits
from autointerp.store.statistics import read_statistics, write_statistics
from autointerp.store.tables import build_cooccurrence

WIDTH, TOKENS, WINDOWS, DIM = 12, 40, 20, 6
FLIPS = 40
CODER = "coders/coder=sae"
INDEX = index_folder("e", window=8, min_window=4)
IN_MANIFEST = (
    f"{CODER}/activations/part-00001.parquet",
    f"{CODER}/coder.json",
    f"{CODER}/latents.parquet",
    "documents/part-00001.parquet",
    "tokenizer/vocab.parquet",
    "tokens/part-00001.parquet",
)
DERIVED = (
    f"{CODER}/logits.parquet",
    f"{CODER}/neighbours-cooccurrence.parquet",
    f"{CODER}/statistics.parquet",
    f"{INDEX}/index.json",
    f"{INDEX}/vectors.npy",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "store"
    store = small_store(path, random_fires(0, width=30)[:WIDTH], part_rows=100, row_group_rows=50)
    build_cooccurrence(store, "sae", k=5)
    write_statistics(store, "sae")
    rng = np.random.default_rng(0)
    columns = {
        f"{side}{suffix}": rng.integers(0, TOKENS, (WIDTH, 3)).astype(kind)
        for side in ("promoted", "suppressed")
        for suffix, kind in (("", np.uint32), ("_logits", np.float32))
    }
    write_logits(store, "sae", [TokenLogits(**columns)])
    vectors = rng.standard_normal((WINDOWS, DIM))
    record = IndexRecord(
        store_id=store.store_id, embedder="e", embedder_id="e", window=8, min_window=4, num_windows=WINDOWS, dim=DIM
    )
    write_index(path / INDEX, record, [vectors / np.linalg.norm(vectors, axis=1, keepdims=True)])
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "store")


def read(path):
    """Everything that readers of a store can be given."""
    store = open_store(path)
    reader = store.coder("sae")
    neighbours = reader.neighbours("cooccurrence")
    segments = store.segments
    arrays = [store.tokens, store.context_lengths, segments.document, segments.start, segments.stop]
    arrays += list(reader.latents.values())
    for latent in range(reader.width):
        arrays += [*reader.activations(latent), *neighbours.of(latent)]
    for rows in (*reader.sweep(), *reader.blocks()):
        arrays += [np.asarray(column) for column in rows]
    arrays.append(store.embeddings("e", window=8, min_window=4).vectors(0, WINDOWS))
    tables = [store.documents(), read_logits(store, "sae"), read_statistics(store, "sae")]
    return (
        [(array.dtype, array.tobytes()) for array in arrays],
        [(table.schema.remove_metadata(), table.to_pydict()) for table in tables],
        (store.manifest.values(), reader.record, neighbours.k, store.vocabulary.pieces(np.arange(TOKENS))),
    )


def damages(data, seed):
    """Truncations and flipped bits, more of them towards the end, where the footers of parquet files are."""
    rng = random.Random(seed)
    yield from (data[:0], data[: len(data) // 2], data[:-1])
    for number in range(FLIPS):
        flipped = bytearray(data)
        low = 0 if number % 2 else len(data) // 2
        flipped[rng.randrange(low, len(data))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


@pytest.mark.parametrize("name", [*IN_MANIFEST, *DERIVED, "manifest.json"])
def test_what_is_read_is_what_was_written(original, path, name):
    whole, file = read(original), path / name
    assert read(path) == whole
    data, told = file.read_bytes(), 0
    for damaged in damages(data, name):
        file.write_bytes(damaged)
        try:
            assert read(path) == whole
        except AutointerpError as error:
            told += 1
            assert str(file) in str(error) and "\n" not in str(error), error
    assert told >= FLIPS // 4
    file.unlink()
    with pytest.raises(StoreError, match=r"restore it|make (it|them|one) (with|again)"):
        read(path)


@pytest.mark.parametrize("name", [*IN_MANIFEST, "manifest.json"])
def test_verify_tells_of_every_change(path, name):
    file = path / name
    data = file.read_bytes()
    for damaged in damages(data, name):
        file.write_bytes(damaged)
        problems = verify_store(path)
        assert all("\n" not in problem for problem in problems)
        is_json_space = name == "manifest.json" and damaged == data[:-1]
        assert problems or is_json_space or damaged == data
    file.unlink()
    assert len(verify_store(path)) == 1


@pytest.mark.parametrize("name", DERIVED)
def test_verify_reads_the_derived_tables(original, path, name):
    """A derived table has checksums of its own; a change that leaves what is read alone is none."""
    whole, file = read(original), path / name
    for damaged in damages(file.read_bytes(), name):
        file.write_bytes(damaged)
        problems = verify_contents(path)
        assert all("\n" not in problem for problem in problems)
        if not problems:
            assert read(path) == whole


@pytest.mark.parametrize(
    ("name", "column", "other"),
    [
        (f"{CODER}/activations/part-00001.parquet", b"position", b"positiom"),
        (f"{CODER}/latents.parquet", b"count", b"counu"),
        (f"{CODER}/statistics.parquet", b"num_tokens", b"num_tokenr"),
        ("tokens/part-00001.parquet", b"starts", b"startr"),
        ("tokenizer/vocab.parquet", b"is_special", b"is_speciam"),
    ],
)
def test_a_column_of_another_name_is_told(path, name, column, other):
    """Names lie in the footer, which has no checksum."""
    data = (path / name).read_bytes()
    assert column in data
    (path / name).write_bytes(data.replace(column, other))
    with pytest.raises(StoreError, match=rf"{name} cannot be read .*; it is damaged"):
        read(path)


def test_a_sealed_file_is_what_was_committed(tmp_path):
    file = tmp_path / "x.json"
    values = {"n": 1, "text": "a", "list": (1, 2), "float": 0.1}
    write_sealed(file, values)
    assert read_sealed(file) == values | {"list": [1, 2]}
    text = file.read_text()
    assert '"n": 1' in text
    file.write_text(text.replace('"n": 1', '"n": 3'))
    with pytest.raises(StoreError, match="is not as it was written"):
        read_sealed(file)
    file.write_text('{"n": 3}')  # of a release that sealed nothing
    assert read_sealed(file) == {"n": 3}
