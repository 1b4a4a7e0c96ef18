"""Imports point down one line, and each heavy library has a home."""

import ast
from pathlib import Path

import autointerp

ROOT = Path(autointerp.__file__).parent
ORDER = [
    {"errors"}, {"digest"}, {"files"}, {"records", "worker"}, {"protocols"}, {"config"}, {"stats", "rules", "prompts"}, {"tables"}, {"store"},
    {"llm", "embed"}, {"coders"}, {"subject"}, {"examples"}, {"scorers"}, {"explainers"}, {"results"}, {"jobs"}, {"reports"}, {"demo"},
    {"studies"}, {"cli"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HOMES = {
    "torch": {"coders", "subject", "llm/hf.py", "demo"},
    "transformers": {"subject", "llm/hf.py", "demo/train.py"},
    "tokenizers": {"subject", "demo/train.py"},
    "vllm": {"llm"},
    "openai": {"llm"},
    "pyarrow": {"tables.py", "store", "subject/corpus.py"},
    "pandas": {"results", "reports", "studies"},
    "sklearn": {"embed", "stats.py"},
    "scipy": {"stats.py", "store/cooccurrence.py"},
    "sentence_transformers": {"embed"},
    "datasets": {"subject"},
}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.name == "__init__.py" and len(relative.parts) == 1:
            continue
        yield relative, ast.parse(path.read_text())


def imports(tree, *, top_level_only=False):
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno


def package_of(relative):
    return relative.parts[0].removesuffix(".py")


def test_every_module_has_a_rank():
    assert {package_of(relative) for relative, _ in modules()} <= set(RANK)


def test_imports_point_down():
    wrong = []
    for relative, tree in modules():
        here = package_of(relative)
        for name, line in imports(tree):
            parts = name.split(".")
            if parts[0] != "autointerp" or len(parts) == 1 or parts[1] == here:
                continue
            if RANK[parts[1]] >= RANK[here]:
                wrong.append(f"{relative}:{line} imports {name}")
    assert not wrong, wrong


def test_heavy_libraries_stay_at_home():
    wrong = []
    for relative, tree in modules():
        for name, line in imports(tree):
            homes = HOMES.get(name.split(".")[0])
            place = relative.as_posix()
            if homes is not None and not any(place == home or place.startswith(home + "/") for home in homes):
                wrong.append(f"{relative}:{line} imports {name}")
    assert not wrong, wrong


def test_explainers_and_scorers_open_no_files():
    for relative, tree in modules():
        if package_of(relative) in ("explainers", "scorers"):
            names = {name for name, _ in imports(tree)}
            assert not names & {"pathlib", "os", "io", "shutil"}, relative
            calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
            assert "open" not in calls, relative


def test_no_unsafe_loading():
    for relative, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle", "trust_remote_code"):
                value = getattr(node.value, "value", None)
                assert value is (node.arg == "weights_only") or not isinstance(node.value, ast.Constant), (relative, node.arg)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert [alias.name for alias in node.names] == ["UnpicklingError"], relative
            elif isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "cloudpickle"}, relative


def test_public_names_resolve_and_are_sorted():
    assert autointerp.__all__ == sorted(autointerp.__all__)
    for name in autointerp.__all__:
        assert getattr(autointerp, name) is not None
