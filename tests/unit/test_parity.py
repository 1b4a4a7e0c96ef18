"""Every published format against what its publisher's own package computed, and against wrong readings and damaged files."""

import os
import pickle
import re
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp.coders.load import FORMATS
from autointerp.coders.tensors import read_pickle
from autointerp.errors import AutointerpError
from tests.parity.table import PATH, table
from tests.parity_cases import Case, cases, compare, is_equal, mutations

CASES = cases()
MANIFEST = {
    "schema", "format", "publisher", "version", "architecture", "variant", "path", "options", "saved_by", "computed_by", "hookpoint",
    "target", "is_transcoder",
}  # fmt: skip
WEIGHTS = {".safetensors", ".pt", ".pth", ".npz"}
MAY_BE_MISSING = {
    ("sparsify", "post_enc"), ("circuit_tracer", "W_skip"), ("circuit_tracer", "activation_function.threshold"),
    ("circuit_tracer_clt", "threshold_1"),
}  # fmt: skip
"""Tensors of a format whose absence no other file contradicts: without them it is another coder."""
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
one_of_each_architecture = pytest.mark.parametrize(
    "case",
    list({(case.manifest["format"], case.manifest["architecture"]): case for case in reversed(CASES)}.values()),
    ids=lambda case: case.name,
)


class TestParity:
    @every_case
    def test_the_publisher_s_own_numbers(self, case):
        coder = case.load()
        result = compare(coder, case)
        assert not result.wrong and result.num_ties == 0
        assert coder.spec.format == case.manifest["format"] and coder.spec.d_in == case.golden["x"].shape[1]

    @every_case
    def test_what_a_case_must_be(self, case):
        assert set(case.manifest) == MANIFEST and case.manifest["schema"] == 1 and case.manifest["format"] in FORMATS
        assert case.num_tokens >= 100 and case.l0 >= 5
        coder = case.load()
        assert coder.spec.width not in (coder.spec.d_in, coder.spec.d_out)
        assert (
            coder.skip_ED is None
            or coder.skip_ED.shape[0] != coder.skip_ED.shape[1]
            or not torch.equal(coder.skip_ED, coder.skip_ED.T)
        )

    @every_case
    def test_a_wrong_reading_is_noticed(self, case):
        mutated = mutations(case.load())
        assert {"decoder transposed", "kind"} <= set(mutated)
        assert [name for name, coder in mutated.items() if is_equal(coder, case)] == []

    def test_all_of_saelens(self):
        found = {
            (case.manifest["architecture"], case.manifest["variant"]) for case in CASES if case.manifest["format"] == "saelens"
        }
        normalisations = {"", "layer_norm", "constant_norm_rescale", "expected_average_only_in"}
        autoencoders = {"standard", "jumprelu", "topk", "abstopk", "gated", "matching_pursuit"}
        transcoders = {"transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"}
        wanted = {(one, other) for one in autoencoders | transcoders for other in normalisations}
        # Refused: no factor can be folded into a dictionary that is its own encoder.
        assert wanted - found == {("matching_pursuit", "expected_average_only_in")}

    def test_all_classes_of_dictionary_learning(self):
        found = {case.manifest["architecture"] for case in CASES if case.manifest["format"] == "dictionary_learning"}
        batch = {"BatchTopKSAE", "MatryoshkaBatchTopKSAE"}
        assert found == {"AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder"} | batch


@pytest.mark.skipif("AUTOINTERP_PARITY" in os.environ, reason="the page is of the committed cases")
def test_the_page_of_formats_is_of_these_cases():
    without_errors = [re.sub(r"< 1e-\d+", "", text) for text in (PATH.read_text(encoding="utf-8"), table())]
    assert without_errors[0] == without_errors[1], "run python -m tests.parity.table"


class TestBadInput:
    """What is damaged is refused in one sentence, or was not needed: then the coder is still the published one."""

    @one_of_each_architecture
    def test_truncated(self, case, tmp_path):
        for path in _files(case):
            copy = _copy(case, tmp_path / path.name)
            damaged = copy.folder / path
            damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size * 2 // 3])
            _refused_or_unneeded(copy, is_refused=path.suffix in WEIGHTS and path.stem != "sparsity")

    @one_of_each_architecture
    def test_pickles_that_would_write_a_file(self, case, tmp_path):
        witness = tmp_path / "written"
        for path in _files(case):
            if path.suffix not in WEIGHTS:
                continue
            for write in (_raw_pickle, _torch_pickle, _numpy_pickle):
                copy = _copy(case, tmp_path / write.__name__ / path.name)
                write(copy.folder / path, _Hostile(witness))
                _refused_or_unneeded(copy, is_refused=True)
                assert not witness.exists()

    @one_of_each_architecture
    def test_missing_and_integer_tensors(self, case, tmp_path):
        refused = 0
        for path in _files(case):
            for name in _names(case.folder / path):
                for number, change in enumerate((lambda tensor: None, lambda tensor: tensor.to(torch.int32))):
                    if number == 0 and (case.manifest["format"], name) in MAY_BE_MISSING:
                        continue
                    copy = _copy(case, tmp_path / f"{path.name}-{name}-{number}")
                    _rewrite(copy.folder / path, name, change)
                    refused += _refused_or_unneeded(copy, is_refused=False)
        assert refused >= 4


class _Hostile:
    def __init__(self, witness):
        self._witness = witness

    def __reduce__(self):
        return Path.write_text, (self._witness, "written")


def test_the_hostile_pickle_would_write(tmp_path):
    pickle.loads(pickle.dumps(_Hostile(tmp_path / "written")))
    assert (tmp_path / "written").read_text() == "written"


def _raw_pickle(path, thing):
    # Of the newer protocols torch says in a warning that it does not know them well.
    path.write_bytes(pickle.dumps(thing, protocol=2))


def _torch_pickle(path, thing):
    torch.save({"W_enc": thing, "encoder.weight": thing}, path)


def _numpy_pickle(path, thing):
    with path.open("wb") as file:
        np.savez(file, W_enc=np.array([thing], dtype=object))


def _files(case):
    root = case.folder / "coder"
    return [path.relative_to(case.folder) for path in sorted(root.rglob("*")) if path.is_file()]


def _copy(case, folder):
    # The publishers' files are below folders whose names the loaders read.
    shutil.copytree(case.folder, folder / case.name)
    return Case(folder / case.name)


def _refused_or_unneeded(case, *, is_refused):
    try:
        coder = case.load()
    except AutointerpError as error:
        assert "\n" not in str(error) and 20 < len(str(error)) < 1000 + len(os.fspath(case.folder))
        return True
    assert not is_refused and is_equal(coder, case)
    return False


def _names(path):
    if path.suffix == ".safetensors":
        return sorted(load_file(path))
    if path.suffix == ".npz":
        with np.load(path) as file:
            return sorted(file.files)
    if path.suffix in WEIGHTS:
        held = read_pickle(path)
        return sorted(name for name, value in _table(held).items() if isinstance(value, torch.Tensor))
    return []


def _table(held):
    return next((held[name] for name in ("ae", "state_dict") if isinstance(held.get(name), dict)), held)


def _rewrite(path, name, change):
    if path.suffix == ".npz":
        with np.load(path) as file:
            held = table = {key: torch.from_numpy(file[key]) for key in file.files}
    else:
        # A copy: what is read lies in the file, which is about to be written.
        held = load_file(path) if path.suffix == ".safetensors" else deepcopy(read_pickle(path))
        table = _table(held)
    changed = change(table.pop(name))
    if changed is not None:
        table[name] = changed
    if path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in held.items()})
    elif path.suffix == ".safetensors":
        save_file(held, path)
    else:
        # An object beside the tensors is of a class that is not here to be written.
        torch.save({key: value for key, value in held.items() if key != "cfg"}, path)
