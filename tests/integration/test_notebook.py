"""The public functions in a notebook, where a loop is running already, through a real kernel."""

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = [
    """
import autointerp
from autointerp.demo.run import cache_settings
from autointerp.jobs.cache import CacheConfig
store_path = autointerp.cache(CacheConfig.parse(cache_settings("store", 24_576, coders=("sae",))))
store = autointerp.open_store(store_path)
positions, values = store.coder("sae").activations(int(store.coder("sae").latents["count"].argmax()))
assert len(positions) == len(values) > 0
""",
    """
import asyncio
assert asyncio.get_running_loop().is_running()
from autointerp.jobs.explain import ExplainConfig
from autointerp.jobs.score import ScoreConfig
shared = dict(results="results", latents="random:8")
explained = autointerp.explain(ExplainConfig.parse(dict(shared, store=str(store_path), explainer="lexical", controls=["shuffled"])))
rule = {name: {"judge": "rule"} for name in ("detection", "fuzzing")}
scored = autointerp.score(ScoreConfig.parse(dict(shared, options=rule, controls=["shuffled"])))
(explained.exit_code, scored.exit_code)
""",
    """
again = await autointerp.ascore(ScoreConfig.parse(dict(shared, options=rule, controls=["shuffled"])))
assert again.num_latents == 0  # nothing was left to do
scores = autointerp.load_scores("results")
headline = scores[scores.is_headline & (scores.status == "ok")]
print(headline.assign(control=headline.control.fillna("none")).groupby(["coder", "scorer", "control"]).value.median())
len(autointerp.load_explanations("results")), len(autointerp.load_verdicts("results"))
""",
    """
page = autointerp.report("results")
print(page)
assert page.exists()
""",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_api_in_a_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [
        "".join(item.get("text", "") or item.get("data", {}).get("text/plain", "") for item in c.outputs)
        for c in notebook.cells
    ]
    assert "(0, 0)" in outputs[1]
    assert "detection" in outputs[2] and "shuffled" in outputs[2]
    assert "index.html" in outputs[3]
