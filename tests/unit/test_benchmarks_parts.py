"""What the benchmarks are built of: the text without end, and commands under a limit."""

import ast
import sys
from itertools import islice

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import corpus
from benchmarks.disk import check_same, store_parts
from benchmarks.limits import disk_bytes, run_limited
from benchmarks.memory import growth

TEXT = "import os\n\n\ndef first(alpha, beta):\n    return alpha + len(beta)  # alpha\n"


def test_names_are_permuted_and_nothing_else():
    found = corpus._permuted(TEXT, "1:x.py")
    names = {"os", "first", "alpha", "beta"}
    assert found == corpus._permuted(TEXT, "1:x.py")
    assert any(corpus._permuted(TEXT, f"{seed}:x.py") != found for seed in range(2, 9))
    ast.parse(found)
    words = found.replace("(", " ").replace(")", " ").replace(",", " ").replace(":", " ").split()
    assert {word for word in words if word.isidentifier()} == names | {"import", "def", "return", "len"}
    assert "len(" in found and found.startswith("import ")


def test_the_library_comes_first_and_then_again_with_other_names(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text(TEXT)
    (tmp_path / "b.py").write_text("x = 1\n")
    monkeypatch.setattr(corpus, "stdlib_root", lambda: tmp_path)
    monkeypatch.setattr(corpus, "stdlib_files", lambda: iter([tmp_path / "a.py", tmp_path / "b.py"]))
    found = list(islice(corpus.texts(), 6))
    assert [name for name, _ in found] == ["a.py", "b.py", "a.py#1", "b.py#1", "a.py#2", "b.py#2"]
    assert [text for _, text in found[:2]] == [TEXT, "x = 1\n"]
    documents = corpus.write_corpus(tmp_path / "corpus.jsonl", num_chars=len(TEXT) + 7)
    assert documents == 3 and len((tmp_path / "corpus.jsonl").read_text().splitlines()) == 3


def test_a_command_is_measured_and_killed(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "x").write_bytes(b"123")
    log = tmp_path / "log"
    settings = {"limit_bytes": None, "environment": {}, "log": log, "watched": {"out": folder}}
    used = run_limited([sys.executable, "-c", "print('here'); raise SystemExit(3)"], **settings)
    assert used.exit_code == 3 and log.read_text() == "here\n" and used.peak_disk == {"out": 3} and used.limit_mb is None
    killed = run_limited([sys.executable, "-c", "import time; time.sleep(600)"], **settings, kill_after_cpu_s=0.0)
    assert killed.exit_code == -9
    assert disk_bytes(folder) == 3


def test_every_file_of_a_store_is_counted_once_by_its_part(tmp_path):
    sizes = {
        "coders/coder=a/activations/part-00000.parquet": 1, "coders/coder=b/activations/part-00000.parquet": 2,
        "coders/coder=a/latents.parquet": 4, "coders/coder=a/coder.json": 8, "tokens/part-00000.parquet": 16,
        "tokenizer/vocab.parquet": 32, "derived/windows-1/start.npy": 64, "manifest.json": 128, "documents/part-00000.parquet": 256,
    }  # fmt: skip
    for name, count in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(count))
    found = store_parts(tmp_path)
    rest = found.pop("manifest, documents, records of the coders")
    assert rest == 8 + 128 + 256
    assert found == {"activations": 3, "statistics of the latents": 4, "tokens": 16, "tokenizer": 32, "derived": 64}


@pytest.mark.parametrize("other", [np.array([1, 3], np.uint16), np.array([1, 2], np.uint32)], ids=["value", "type"])
def test_another_tensor_in_an_export_is_found(tmp_path, other):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        save_file({"locations": np.array([1, 2], np.uint16)}, tmp_path / name / "0_9.safetensors")
    assert check_same(tmp_path / "ours", tmp_path / "theirs") == 1
    save_file({"locations": other}, tmp_path / "theirs" / "0_9.safetensors")
    with pytest.raises(SystemExit, match="not those of the export"):
        check_same(tmp_path / "ours", tmp_path / "theirs")


def test_growth_is_from_the_first_to_the_last():
    assert (
        growth([(1_000_000, 500.0), (2_000_000, 900.0), (5_000_000, 540.0)])
        == "+40.0 MB over 4.0M tokens, +10.00 MB per million"
    )
