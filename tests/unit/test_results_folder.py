"""Layout, identity and records of runs of a results folder."""

import json
import threading

import pytest

from autointerp.digest import digest, short
from autointerp.errors import ConfigError, IdentityError, StoreError
from autointerp.results.folder import Method, ResultsFolder, check_method_name, create_exclusive


@pytest.fixture
def folder(tmp_path):
    return ResultsFolder.create(tmp_path / "results", store_id="s1", provenance={"store": "cache/x"})


def explainer(version):
    return Method(stage="explain", name="default", model="m", identity={"version": version})


def test_places(folder):
    method = explainer(1)
    assert method.id == digest({"version": 1})
    assert method.label == f"default-{short(method.id)}"
    grading = Method(stage="score", name="detection", model="m", control="shuffled", identity={"x": 1}, explainer=method.label)
    place = folder.table("scores", grading, 12).relative_to(folder.path).as_posix()
    assert place == f"scores/{method.label}/detection-shuffled-{short(grading.id)}/shard-000012.parquet"
    place = folder.table("explanations", method, 0).relative_to(folder.path).as_posix()
    assert place == f"explanations/{method.label}/shard-000000.parquet"
    assert folder.marker("explain", method.label, 3).relative_to(folder.path).as_posix() == (
        f"state/explain/{method.label}/shard-000003.json"
    )


def test_another_store_is_refused(folder):
    again = ResultsFolder.create(folder.path, store_id="s1", provenance={"store": "moved"})
    assert again.provenance() == {"store": "cache/x"}
    with pytest.raises(IdentityError, match="belongs to another store: store_id is s1 there and s2 now"):
        ResultsFolder.create(folder.path, store_id="s2", provenance={})
    with pytest.raises(
        IdentityError, match=r"made when the store had 10,000 tokens; the store was extended since, which changes"
    ):
        ResultsFolder.create(folder.path, store_id="s2", provenance={}, outgrown={"s0": 1, "s1": 10_000})


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"holds other files and no results\.json"):
        ResultsFolder.create(tmp_path, store_id="s", provenance={})
    with pytest.raises(StoreError, match=r"no results\.json"):
        ResultsFolder.open(tmp_path)
    with pytest.raises(StoreError, match="no such folder"):
        ResultsFolder.open(tmp_path / "nowhere")


def test_a_newer_layout_is_refused(folder):
    path = folder.path / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 9}))
    with pytest.raises(StoreError, match="has layout 9, this release reads layout 1"):
        ResultsFolder.open(folder.path)


def test_a_coder_keeps_its_name(folder):
    folder.register_coder("a", "c1")
    folder.register_coder("a", "c1")
    with pytest.raises(IdentityError, match="another coder named 'a': coder_id is c1 there and c2 now"):
        folder.register_coder("a", "c2")


def test_methods_are_remembered(folder):
    one, two = explainer(1), explainer(2)
    for method in (one, two, one):
        folder.register(method)
    assert folder.methods("explain") == sorted((one, two), key=lambda m: m.label)
    assert folder.explainer(two.label) == two
    with pytest.raises(ConfigError, match="several explainers and the choice is open"):
        folder.explainer("default")
    with pytest.raises(ConfigError, match=r"has no explainer 'lexical'; known: default-\w+, default-\w+"):
        folder.explainer("lexical")


def test_no_explainer_yet(folder):
    with pytest.raises(ConfigError, match="holds no explanations yet"):
        folder.explainer(None)


def test_runs_are_numbered_and_never_overwritten(folder):
    paths = [folder.record_run("explain", {"i": i}) for i in range(3)]
    assert [path.name for path in paths] == ["0001-explain.json", "0002-explain.json", "0003-explain.json"]
    assert [json.loads(path.read_text())["i"] for path in paths] == [0, 1, 2]
    threads = [threading.Thread(target=folder.record_run, args=("score", {})) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((folder.path / "runs").iterdir())) == 11


def test_create_exclusive_has_one_winner(tmp_path):
    path, won = tmp_path / "x.json", []
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        if create_exclusive(path, str(i).encode()):
            won.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text()] == [str(i) for i in won]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("name", ["", "a/b", "a-b", "..", "a b"])
def test_method_names(name):
    with pytest.raises(ConfigError, match="expected letters, digits"):
        check_method_name(name)
