"""Reading a store: by offset, from many threads, and damage told in one sentence."""

import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_store import rewrite_manifest

from autointerp.errors import InputError, StoreError
from autointerp.store import CoderRecord, Document, Identity, StoreWriter, open_store, verify_store, write_vocabulary
from autointerp.store.reader import MAX_IDLE_FILES

CTX_LEN = 64
NUM_CONTEXTS = 30
WIDTH = 40


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("read") / "store"
    identity = Identity(ctx_len=CTX_LEN, subject_digest="sha256:s", packing="fill")
    record = CoderRecord(digest="sha256:c", width=WIDTH, hookpoints=("h@out",), activation="relu", reading={"eps": 0})
    with StoreWriter.create_or_resume(
        path, identity=identity, coders={"sae": record}, contexts_per_run=11, row_group_rows=100, part_rows=700
    ) as writer:
        write_vocabulary(path / "tokenizer", [b"a", b" b"], [False, False])
        rng = np.random.default_rng(0)
        for context in range(NUM_CONTEXTS):
            writer.add_contexts(
                [rng.integers(0, 2, CTX_LEN)], [[(context, 0)]], documents=[Document(document=context, source_row=context)]
            )
            fires = rng.random((WIDTH, CTX_LEN)) < np.linspace(0, 1, WIDTH)[:, None] ** 4
            latents, offsets = np.nonzero(fires)
            writer.add_activations("sae", latents, context * CTX_LEN + offsets, rng.random(len(latents)) + 0.5)
            if not writer.room:
                writer.close_run()
        writer.finish()
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "store")


def test_dense_and_dead_latents(original):
    reader = open_store(original).coder("sae")
    assert reader.latents["count"][WIDTH - 1] == NUM_CONTEXTS * CTX_LEN and reader.latents["density"][WIDTH - 1] == 1.0
    assert reader.latents["num_row_groups"][WIDTH - 1] > 10
    positions, values = reader.activations(WIDTH - 1)
    assert positions.tolist() == list(range(NUM_CONTEXTS * CTX_LEN)) and (values > 0.4).all()
    assert [len(array) for array in reader.activations(0)] == [0, 0]
    assert reader.latents["minhash"].shape == (WIDTH, 16) and reader.latents["minhash"].dtype == np.uint32


@pytest.mark.parametrize("latent", [-1, WIDTH, 10**9])
def test_no_such_latent(original, latent):
    with pytest.raises(InputError, match=rf"'sae' has no latent {latent}: its width is 40"):
        open_store(original).coder("sae").activations(latent)


def test_no_such_coder(original):
    with pytest.raises(InputError, match=r"has no coder 'sea'; did you mean 'sae'\?"):
        open_store(original).coder("sea")


def test_sweep_of_some(original):
    reader = open_store(original).coder("sae")
    found = list(reader.sweep([39, 0, 20, 21, 20]))
    assert [latent for latent, *_ in found] == [0, 20, 21, 39]
    for latent, positions, values in found:
        np.testing.assert_array_equal(positions, reader.activations(latent)[0])
        np.testing.assert_array_equal(values, reader.activations(latent)[1])
    with pytest.raises(InputError, match="no latent 40"):
        list(reader.sweep([40]))


def test_results_are_private_and_columns_are_not_writeable(original):
    store = open_store(original)
    reader = store.coder("sae")
    positions, values = reader.activations(30)
    positions[:], values[:] = -1, 0
    assert (reader.activations(30)[0] >= 0).all() and (reader.activations(30)[1] > 0).all()
    for array in (store.tokens, store.context_lengths, store.segments.start, reader.latents["count"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_many_threads(original):
    store = open_store(original)
    reader = store.coder("sae")
    expected = {latent: open_store(original).coder("sae").activations(latent) for latent in range(WIDTH)}
    wrong = []

    def work(seed):
        for latent in np.random.default_rng(seed).integers(0, WIDTH, 100).tolist():
            found = reader.activations(latent)
            if any(not np.array_equal(a, b) for a, b in zip(found, expected[latent], strict=True)):
                wrong.append(latent)
        if len(store.tokens) != NUM_CONTEXTS * CTX_LEN:
            wrong.append("tokens")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(store._files._idle) <= MAX_IDLE_FILES
    store.close()
    assert len(reader.activations(WIDTH - 1)[0]) == NUM_CONTEXTS * CTX_LEN


def part(path):
    return path / "coders" / "coder=sae" / "activations" / "part-00001.parquet"


def latent_in(reader, number):
    return int(np.flatnonzero(reader.latents["part"] == number)[0])


def test_missing_part(path):
    reader = open_store(path).coder("sae")
    part(path).unlink()
    with pytest.raises(StoreError, match=r"part-00001.parquet is missing from the store"):
        reader.activations(latent_in(reader, 1))
    assert len(reader.activations(latent_in(reader, 0))[0])


def test_truncated_part(path):
    part(path).write_bytes(part(path).read_bytes()[:-100])
    reader = open_store(path).coder("sae")
    with pytest.raises(StoreError, match=r"part-00001.parquet cannot be read .* damaged or truncated"):
        reader.activations(latent_in(reader, 1))


def test_flipped_byte_is_noticed_where_it_is_read(path):
    data = bytearray(part(path).read_bytes())
    offset = pq.ParquetFile(part(path)).metadata.row_group(0).column(2).data_page_offset
    data[offset + 60] ^= 1
    part(path).write_bytes(data)
    reader = open_store(path).coder("sae")
    with pytest.raises(StoreError, match=r"part-00001.parquet cannot be read"):
        reader.activations(latent_in(reader, 1))


def test_latents_of_another_store(path):
    table = pq.ParquetFile(path / "coders" / "coder=sae" / "latents.parquet").read()
    pq.write_table(table.slice(0, 7), path / "coders" / "coder=sae" / "latents.parquet")
    with pytest.raises(StoreError, match=r"latents.parquet has 7 latents and the manifest says 40"):
        open_store(path).coder("sae").activations(3)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_damaged_manifest(path, content):
    (path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest.json (is not|has schema 99, this release reads up to 1)"):
        open_store(path)


def test_verify_finds_nothing_wrong(original):
    assert verify_store(original) == []


def test_verify_tells_every_flipped_byte_truncation_and_loss(path):
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert len(names) > 10
    for name in set(names) - {"manifest.json"}:
        data = (path / name).read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        for damage in (bytes(flipped), data[:-1], None):
            (path / name).unlink()
            if damage is not None:
                (path / name).write_bytes(damage)
            problems = verify_store(path)
            assert len(problems) == 1 and str(path / name) in problems[0], (name, problems)
            (path / name).write_bytes(data)
    assert verify_store(path) == []


def test_verify_compares_what_the_files_hold(path):
    manifest = (path / "manifest.json").read_text()
    rewrite_manifest(path, ('"subject_digest": "sha256:s"', '"subject_digest": "sha256:t"'))
    assert any("store_id that is not the digest of its identity" in problem for problem in verify_store(path))
    (path / "manifest.json").write_text(manifest)
    count = open_store(path).coder("sae").num_activations
    rewrite_manifest(path, (f'"num_activations": {count}', '"num_activations": 5'))
    assert any(f"says 5 activations of 'sae', not {count}" in problem for problem in verify_store(path))
    (path / "manifest.json").write_text(manifest)
    rewrite_manifest(path, ('"num_tokens": 1920', '"num_tokens": 1921'))
    assert any("says 30 of 1921" in problem for problem in verify_store(path))
    (path / "manifest.json").write_text(manifest)
    shutil.copy(path / "tokens" / "part-00000.parquet", path / "tokens" / "part-00009.parquet")
    assert ["part-00009.parquet is not in the manifest" in problem for problem in verify_store(path)] == [True]


@pytest.mark.parametrize("fault", ["order", "count", "range"])
def test_verify_sees_wrong_content_whose_digests_agree(path, fault):
    """Parts rewritten by someone who rewrote the digests as well."""
    file = part(path)
    table = pq.ParquetFile(file).read().to_pydict()
    if fault == "order":
        table["position"][3], table["position"][4] = table["position"][4], table["position"][3]
    elif fault == "count":
        table["latent"] = [latent - (latent == table["latent"][-1]) for latent in table["latent"]]
        table = {name: column[: table["latent"].index(table["latent"][-1])] for name, column in table.items()}
    else:
        table["position"][-1] = NUM_CONTEXTS * CTX_LEN
    import pyarrow as pa

    from autointerp.store.layout import file_entry
    from autointerp.store.merge import activations_schema

    pq.write_table(pa.table(table, schema=activations_schema(np.dtype(np.float16))), file, row_group_size=100)
    old = open_store(path).manifest.files[file.relative_to(path).as_posix()]
    new = file_entry(file)
    sizes = f'"num_bytes": {old.num_bytes},', f'"num_bytes": {new.num_bytes},'
    rewrite_manifest(path, (old.digest, new.digest), sizes)
    sentence = {"order": "is not sorted", "count": r"latents.parquet says", "range": "beyond the coder's width or the corpus"}
    assert any(sentence[fault] in problem for problem in verify_store(path))


@pytest.mark.parametrize("way", ["sweep", "one by one"])
def test_latents_in_order_decode_no_row_group_twice(original, monkeypatch, way):
    decoded, read = [], pq.ParquetFile.read_row_groups

    def counted(file, groups, **kwargs):
        decoded.extend((id(file), group) for group in groups)
        return read(file, groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    reader = open_store(original).coder("sae")
    live = np.flatnonzero(reader.latents["count"]).tolist()
    swept = list(reader.sweep()) if way == "sweep" else [(latent, *reader.activations(latent)) for latent in live]
    assert len(decoded) == len(set(decoded)) > len(reader._parts)
    expected = {latent: reader.activations(latent) for latent in reversed(live)}
    assert [latent for latent, _, _ in swept] == live
    for latent, positions, values in swept:
        np.testing.assert_array_equal(positions, expected[latent][0])
        np.testing.assert_array_equal(values, expected[latent][1])


def test_latents_in_no_order_decode_what_they_need(original, monkeypatch):
    asked, read = [], pq.ParquetFile.iter_batches

    def counted(file, num_rows, groups, columns, **kwargs):
        asked.append((groups, num_rows))
        return read(file, num_rows, groups, columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    reader = open_store(original).coder("sae")
    expected = {latent: (positions, values) for latent, positions, values in reader.sweep()}
    columns = reader.latents
    # Row groups hold 100 rows here.
    ends = columns["row_offset"] - 100 * columns["row_group"] + columns["count"]
    before, num_lone = None, 0
    for latent in [*np.random.default_rng(1).permutation(list(expected)).tolist() * 3, *expected]:
        asked.clear()
        place = columns["part"][latent], columns["row_group"][latent]
        for found, wanted in zip(reader.activations(latent), expected[latent], strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert asked in ([], [([place[1]], ends[latent])])
        # Whoever asks for the group again is likely to go on.
        assert not (asked and place == before)
        before, num_lone = place, num_lone + len(asked)
    assert num_lone > 10


@pytest.mark.parametrize(
    ("column", "change", "sentence"),
    [
        ("row_group", 10**6, "part-00000.parquet cannot be read"),
        ("row_offset", 10**6, "does not belong to .*latents.parquet"),
        ("row_offset", -(10**6), "does not belong to .*latents.parquet"),
    ],
)
def test_latents_that_lie_elsewhere(path, column, change, sentence):
    file = path / "coders" / "coder=sae" / "latents.parquet"
    table = pq.ParquetFile(file).read()
    index = table.column_names.index(column)
    moved = pa.array(table[column].to_numpy() + change, table.schema.field(index).type)
    pq.write_table(table.set_column(index, table.schema.field(index), moved), file)
    reader = open_store(path).coder("sae")
    for _ in range(2):
        with pytest.raises(StoreError, match=sentence):
            reader.activations(int(np.flatnonzero(reader.latents["count"])[0]))
