"""The tables beside a store's activations, from the command line; negatives of every source; checking contents; running again."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from autointerp import explain, load_scores, load_verdicts, score
from autointerp.cli.tables import command as tables_command
from autointerp.cli.verify import command as verify_command
from autointerp.coders.load import load_coder
from autointerp.digest import digest_file
from autointerp.errors import ConfigError, IdentityError, InputError, StoreError
from autointerp.examples.negatives import NEGATIVES
from autointerp.examples.selection import SelectionConfig
from autointerp.files import read_sealed, write_sealed
from autointerp.jobs.cache import cache
from autointerp.jobs.explain import ExplainConfig
from autointerp.jobs.rerun import rerun
from autointerp.jobs.score import ScoreConfig
from autointerp.jobs.tables import TablesConfig, build_tables
from autointerp.store import open_store, verify_store
from autointerp.store.contents import verify_contents
from autointerp.store.layout import file_entry
from autointerp.store.logits import read_logits
from autointerp.store.statistics import read_statistics
from tests.tiny import TEXTS, tiny_sparsify, tiny_subject

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

LETTERS = "test_embed:Letters"
SELECTION = SelectionConfig(
    window=8, min_window=4, num_positives=15, num_negatives=15, embedder=LETTERS, negatives=tuple(NEGATIVES)
)


@pytest.fixture(scope="module")
def original(tiny_subject, tiny_sae, tiny_transcoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    rows = [{"text": TEXTS[i % 3] * 2 + f" {i * 7919} and {i}"} for i in range(60)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "subject": str(tiny_subject),
        "corpus": {"source": str(folder / "corpus.jsonl"), "ctx_len": 32, "num_tokens": None},
        "coders": [{"name": "sae", "source": str(tiny_sae)}, {"name": "transcoder", "source": str(tiny_transcoder)}],
        "out": folder / "store",
        "device": "cpu",
        "progress": False,
        "force": True,  # random coders fit nothing
    }
    return cache(settings)


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "store")


@pytest.fixture(scope="module")
def full(original, tiny_subject, tmp_path_factory):
    """A copy with every table."""
    path = shutil.copytree(original, tmp_path_factory.mktemp("full") / "store")
    arguments = [str(path), "--neighbours", "all", "--statistics", "--subject", str(tiny_subject)]
    arguments += ["--embedder", LETTERS, "--window", "8", "--min-window", "4", "--device", "cpu"]
    result = CliRunner().invoke(tables_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count(": computed") == 2 * 5 + 1
    return path, arguments


def test_what_is_there_is_left_alone(full):
    path, arguments = full
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    output = CliRunner().invoke(tables_command, arguments, catch_exceptions=False).output
    assert output.count(": there already") == 11 and "computed" not in output
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before
    assert not list(path.rglob(".tmp*"))


def test_nothing_named_makes_neighbours_by_co_firing_and_statistics(path):
    lines = list(build_tables(TablesConfig(store=path, coders=("sae",)), progress=False))
    assert lines == ["neighbours by cooccurrence of sae: computed", "statistics of sae: computed"]
    # A longer list is computed anew, a shorter one is a part of what is there.
    assert list(build_tables(TablesConfig(store=path, coders=("sae",), neighbours=("cooccurrence",), k=3))) == [
        "neighbours by cooccurrence of sae: there already"
    ]
    [line] = build_tables(TablesConfig(store=path, coders=("sae",), neighbours=("cooccurrence",), k=300))
    assert line.endswith(": computed") and open_store(path).coder("sae").neighbours("cooccurrence").k == 300


def test_cosines_and_logits_are_of_the_coders_own_weights(full, tiny_transcoder):
    path, _ = full
    store = open_store(path)
    coder = load_coder(tiny_transcoder)
    for kind, rows in (("decoder", coder.decoder_rows()), ("encoder", coder.encoder_rows())):
        unit = (rows / rows.norm(dim=1, keepdim=True)).numpy().astype(float)
        cosine = unit @ unit.T
        neighbours, similarities = store.coder("transcoder").neighbours(kind).of(5)
        assert neighbours.tolist() == [i for i in np.argsort(-cosine[5]).tolist() if i != 5]
        np.testing.assert_allclose(similarities, cosine[5][neighbours], atol=1e-5)
    logits = read_logits(store, "transcoder").to_pylist()
    assert [row["latent"] for row in logits] == list(range(48))
    assert len(logits[0]["promoted"]) == len(logits[0]["suppressed"]) == 50
    statistics = read_statistics(store, "sae").to_pylist()
    assert sum(sum(row["histogram"] or []) for row in statistics) == store.coder("sae").num_activations


def test_inputs_of_another_store_are_refused(path, tmp_path, tiny_sae):
    other = tiny_subject(tmp_path / "other", seed=5)
    with pytest.raises(IdentityError, match="name the subject it was recorded with"):
        list(build_tables(TablesConfig(store=path, subject=str(other), device="cpu")))
    strange = tiny_sparsify(tmp_path / "strange", seed=9)
    with pytest.raises(IdentityError, match=r"name the files it was recorded with as --coder sae=SOURCE"):
        list(build_tables(TablesConfig(store=path, coders=(f"sae={strange}",), neighbours=("decoder",))))
    with pytest.raises(InputError, match=r"the weights of coder 'sae' are needed: .* say where they are with"):
        list(build_tables(TablesConfig(store=path, coders=(f"sae={tmp_path / 'gone'}",), neighbours=("encoder",))))
    with pytest.raises(InputError, match="has no coder 'sea'"):
        list(build_tables(TablesConfig(store=path, coders=("sea",))))
    assert verify_store(path) == []


def test_neurons_need_the_subject_and_controls_are_left_out(original, tiny_subject, tmp_path):
    settings = {
        "subject": str(tiny_subject),
        "corpus": {"source": str(original.parent / "corpus.jsonl"), "ctx_len": 32, "num_tokens": 640},
        "coders": [{"name": "mlp", "source": "neurons:model.layers.1?k=4"}],
        "controls": ["random-coder"],
        "out": tmp_path / "store",
        "device": "cpu",
        "progress": False,
        "force": True,
    }
    path = cache(settings)
    assert open_store(path).coder_names == ["mlp", "mlp-random"]
    with pytest.raises(InputError, match="has the weights of the subject's own neurons"):
        list(build_tables(TablesConfig(store=path, neighbours=("decoder",)), progress=False))
    with pytest.raises(InputError, match="'mlp-random' is a control, whose weights are kept nowhere"):
        list(build_tables(TablesConfig(store=path, coders=("mlp-random",), neighbours=("decoder",)), progress=False))
    wanted = TablesConfig(store=path, neighbours=("cooccurrence", "decoder"), subject=str(tiny_subject), device="cpu")
    made = [line.partition(":")[0] for line in build_tables(wanted, progress=False)]
    assert made == [
        "neighbours by cooccurrence of mlp",
        "neighbours by decoder of mlp",
        "neighbours by cooccurrence of mlp-random",
        "logits of mlp",
    ]
    with pytest.raises(InputError, match="reads one coordinate per latent"):
        list(build_tables(wanted.model_copy(update={"neighbours": ("encoder",)}), progress=False))
    assert rerun(path, str(tiny_subject), num_contexts=3, device="cpu") == []


# Negatives of every source ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_by_every_source_of_negatives(path, tmp_path):
    """Neighbours are made on the spot; embeddings are asked for; scores appear apart by source."""
    config = ExplainConfig(
        store=path, results=tmp_path / "r", latents="all", coders=("sae",), explainer="lexical", selection=SELECTION
    )
    judged = ScoreConfig(results=tmp_path / "r", options={name: {"judge": "rule"} for name in ("detection", "fuzzing")})
    with pytest.raises(StoreError, match=r"`autointerp tables .* --embedder test_embed:Letters --window 8 --min-window 4`"):
        explain(config, progress=False)
    list(build_tables(TablesConfig(store=path, embedder=LETTERS, window=8, min_window=4), progress=False))
    assert explain(config, progress=False).exit_code == 0
    assert score(judged, progress=False).exit_code == 0
    table = load_scores(tmp_path / "r")
    found = table[(table["status"] == "ok") & (table["metric"] == "balanced_accuracy")]
    assert set(found["negatives"]) == set(NEGATIVES)
    assert set(found["scorer"]) == {"detection", "fuzzing"}
    verdicts = load_verdicts(tmp_path / "r")
    assert set(verdicts[~verdicts["truth"]]["source"]) == set(NEGATIVES)
    assert (verdicts[verdicts["truth"]]["source"] == "positive").all()
    assert {f"neighbours-{kind}.parquet" for kind in ("cooccurrence", "decoder", "encoder")} <= {
        file.name for file in open_store(path).coder("sae").folder.iterdir()
    }


# Contents ---------------------------------------------------------------------------------------------------------------


def test_a_whole_store_has_no_problem(full, tiny_subject):
    path, _ = full
    arguments = [str(path), "--contents", "--rerun", "5", "--subject", str(tiny_subject), "--device", "cpu"]
    result = CliRunner().invoke(verify_command, arguments, catch_exceptions=False)
    assert (result.exit_code, result.output) == (0, f"{path}: no problem found\n")


@pytest.mark.parametrize("where", ["coders/coder=sae/activations/part-00000.parquet", "tokens/part-00000.parquet"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: file.write_bytes(_flipped(file.read_bytes())), "has the digest"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "bytes and had"),
        (lambda file: file.unlink(), "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_damage_to_a_part_is_one_sentence(path, where, damage, told):
    damage(path / where)
    result = CliRunner().invoke(verify_command, [str(path), "--contents"], catch_exceptions=False)
    first, last = result.output.splitlines()
    assert result.exit_code == 2
    assert told in first and str(path / where) in first
    assert last.endswith("1 problems found")


def _flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


TABLES = [
    "coders/coder=sae/neighbours-decoder.parquet",
    "coders/coder=sae/statistics.parquet",
    "coders/coder=sae/logits.parquet",
]


@pytest.mark.parametrize("where", TABLES)
@pytest.mark.parametrize("damage", [_flipped, lambda content: content[:-100]], ids=["flipped", "truncated"])
def test_damage_to_a_table_is_one_sentence(full, tmp_path, where, damage):
    path = shutil.copytree(full[0], tmp_path / "store")
    (path / where).write_bytes(damage((path / where).read_bytes()))
    [problem] = verify_contents(path)
    assert str(path / where) in problem and "damaged or truncated" in problem


def test_tables_that_do_not_fit_are_told(full, tmp_path):
    path = shutil.copytree(full[0], tmp_path / "store")
    coder = path / "coders/coder=sae"
    _rewrite(coder / "neighbours-encoder.parquet", "similarities", lambda rows: [row[::-1] for row in rows])
    _rewrite(coder / "statistics.parquet", "histogram", lambda rows: [row and [row[0] + 1, *row[1:]] for row in rows])
    _rewrite(coder / "logits.parquet", "latent", lambda rows: rows[::-1])
    [folder] = path.glob("embeddings/*")
    vectors = np.load(folder / "vectors.npy", allow_pickle=False)
    vectors[11] = 0
    np.save(folder / "vectors.npy", vectors)
    record = read_sealed(folder / "index.json") | {"vectors_digest": digest_file(folder / "vectors.npy")}
    write_sealed(folder / "index.json", record)
    problems = verify_contents(path)
    assert len(problems) == 4
    for problem, part in zip(
        problems, ("neighbours of latent 0", "counts other", "once and in order", "for window 11"), strict=True
    ):
        assert part in problem and "compute it again" in problem


def test_statistics_of_latents_are_computed_anew(path):
    file = path / "coders/coder=sae/latents.parquet"
    _rewrite(file, "q50", lambda rows: [value and value * 2 for value in rows])
    _trust(path, file)
    assert verify_store(path) == []
    [problem] = verify_contents(path)
    assert "has another q50 of latent" in problem


def test_activations_that_the_subject_does_not_give_are_told(path, tiny_subject):
    arguments = {"num_contexts": 4, "device": "cpu"}
    assert rerun(path, str(tiny_subject), **arguments) == []
    file = path / "coders/coder=sae/activations/part-00000.parquet"
    original = pq.read_table(file, partitioning=None)
    _rewrite(file, "activation", lambda rows: [value * 1.05 for value in rows])
    [problem] = rerun(path, str(tiny_subject), **arguments)
    assert "coder 'sae'" in problem and "when run again" in problem and "tolerance 0.2%" in problem
    # Values that float16 has rounded once more are within the tolerance.
    pq.write_table(original, file)
    _rewrite(file, "activation", lambda rows: [value * 1.0005 for value in rows])
    assert rerun(path, str(tiny_subject), **arguments) == []


def test_activations_of_another_latent_are_told(path, tiny_subject):
    file = path / "coders/coder=transcoder/activations/part-00000.parquet"
    _rewrite(file, "position", lambda rows: [position ^ 1 for position in rows])
    [problem] = rerun(path, str(tiny_subject), num_contexts=6, device="cpu")
    assert "coder 'transcoder'" in problem


def test_running_again_needs_the_stores_own_subject_and_coders(path, tmp_path):
    other = tiny_subject(tmp_path / "other", seed=5)
    with pytest.raises(IdentityError, match="name the subject it was recorded with"):
        rerun(path, str(other), num_contexts=1, device="cpu")
    with pytest.raises(ConfigError, match="--rerun N and --subject MODEL go together"):
        CliRunner().invoke(verify_command, [str(path), "--rerun", "3"], catch_exceptions=False)


def _rewrite(file, column, change):
    """Write a parquet file again with one column changed; its metadata stay."""
    table = pq.read_table(file, partitioning=None)
    at = table.schema.get_field_index(column)
    values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(at, table.schema.field(column), values), file, row_group_size=1 << 16)


def _trust(path, file):
    """Put a file's present content into the manifest."""
    manifest = read_sealed(path / "manifest.json")
    name = file.relative_to(path).as_posix()
    manifest["files"][name] = file_entry(file, num_rows=manifest["files"][name]["num_rows"]).model_dump(mode="json")
    write_sealed(path / "manifest.json", manifest)
