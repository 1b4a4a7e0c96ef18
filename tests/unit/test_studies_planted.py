"""Planted latents: what fires is what the rule says, and noise does to it what it says."""

import asyncio

import numpy as np
import pytest

from autointerp.demo import bundled
from autointerp.errors import InputError
from autointerp.protocols import Resources
from autointerp.records import Examples, LatentExamples
from autointerp.store import CoderRecord, Document, Identity, StoreVocabulary, StoreWriter, open_store, write_vocabulary
from autointerp.studies.plant import CTX_LEN, EXACT, LEVELS, Noise, Truth
from autointerp.studies.planted import ORIGIN, ROLES, PlantedConfig, PlantedExplanations, planted_in, planted_latents, to_values
from autointerp.subject.corpus import Context
from autointerp.subject.tokenizer import load_tokenizer
from autointerp.subject.vocabulary import token_bytes

TEXT = """
# import the header, then return 12 values
import header
def get(self, value):
    raise ValueError("the Header is wrong: %s" % value, 12)
    return self.append(value), -3
class Port:
    port.timeout = None
"""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled("model"))


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return StoreVocabulary(*token_bytes(tokenizer))


@pytest.fixture(scope="module")
def latents(vocabulary):
    return planted_latents(vocabulary)


def contexts_of(tokens, documents=(0,)):
    """Contexts of one long document, or of as many as named."""
    found = []
    for start in range(0, len(tokens), CTX_LEN):
        ids = tokens[start : start + CTX_LEN]
        document = documents[min(start // CTX_LEN, len(documents) - 1)]
        found.append(Context(tokens=ids, segments=[(document, 0)], is_template=None, documents=[]))
    return found


def token_of(text, vocabulary):
    return next(i for i in range(len(vocabulary)) if vocabulary.text(np.array([i], np.uint32)) == text)


def test_every_family_has_what_it_promises(latents):
    assert len({latent.name for latent in latents}) == len(latents) >= 50
    for latent in latents:
        if latent.family == "noise":
            assert latent.rule is None and 0 < latent.rate < 1 and set(latent.explanations) == {"neighbour", "wrong"}
            continue
        assert set(latent.explanations) == set(ROLES) and latent.rate == 0
        texts = [e.text for e in latent.explanations.values()]
        assert len(set(texts)) == len(texts), latent.name
        assert not any("{" in text for text in texts)
        own = latent.rule.to_json()
        assert latent.explanations["true"].rule.to_json() == latent.explanations["paraphrase"].rule.to_json() == own
        for role in ("too_broad", "too_narrow", "neighbour", "wrong"):
            assert latent.explanations[role].rule.to_json() != own, (latent.name, role)


def test_broad_holds_the_true_rule_and_narrow_is_held_by_it(latents, tokenizer, vocabulary):
    ids = np.array(tokenizer(TEXT * 3)["input_ids"], np.uint32)
    fired = 0
    for latent in latents:
        if latent.rule is None:
            continue
        true, broad, narrow = (
            latent.explanations[role].rule.predict(ids[None], np.array([len(ids)]), vocabulary)[0]
            for role in ("true", "too_broad", "too_narrow")
        )
        assert not (narrow & ~true).any(), latent.name
        assert not (true & ~broad).any() or latent.family in ("mixture", "set", "dense", "token"), latent.name
        fired += bool(true.any())
    assert fired > 20


def texts_at(latents, name, tokenizer, vocabulary):
    ids = np.array(tokenizer(TEXT)["input_ids"], np.uint32)
    [latent] = [latent for latent in latents if latent.name == name]
    active = latent.rule.predict(ids[None], np.array([len(ids)]), vocabulary)[0]
    return [vocabulary.text(ids[i : i + 1]) for i in np.flatnonzero(active)]


def test_rules_fire_where_a_reader_expects(latents, tokenizer, vocabulary):
    def at(name):
        return texts_at(latents, name, tokenizer, vocabulary)

    assert at("token-2") == [" import", "import"]
    assert at("comment-0") == [" the"]
    assert at("digits-0") == ["3"]
    assert at("after-1") == ["append"]
    assert at("topic-0") == ["timeout"]


def test_noise_moves_or_drops_the_share_it_names(latents, vocabulary):
    random = np.random.default_rng(0)
    some = [latent for latent in latents if latent.name in ("token-0", "digits-0", "noise-0")]
    ids = random.integers(5, 4000, 60 * CTX_LEN).astype(np.uint32)
    ids[::40] = token_of(" return", vocabulary)
    truth = Truth.of(contexts_of(ids), some, vocabulary, seed=0)
    exact = truth.firings(Noise(kind="moved", share=0))

    def places(firings, latent):
        return set(firings.positions[firings.latents == latent].tolist())

    expected = np.flatnonzero(some[0].rule.predict(ids[None], np.array([len(ids)]), vocabulary)[0])
    assert places(exact, 0) == set(expected.tolist()) and len(expected) >= len(ids) // 40
    assert 0.002 < len(places(exact, 2)) / len(ids) < 0.006
    before = set()
    for share in (0.1, 0.3, 0.6):
        moved, missed = (truth.firings(Noise(kind=kind, share=share)) for kind in ("moved", "missed"))
        for latent in range(3):
            whole, kept = places(exact, latent), places(missed, latent)
            assert len(places(moved, latent)) == len(whole)
            assert kept == places(moved, latent) & whole
        gone = places(exact, 0) - places(missed, 0)
        assert abs(len(gone) / len(expected) - share) < 0.12
        assert before <= gone, "what a share of noise hits, a larger one hits too"
        before = gone
    assert np.array_equal(
        exact.values[exact.latents == 0], truth.firings(Noise(kind="moved", share=0)).values[exact.latents == 0]
    )


def test_rules_see_documents_whole_and_apart(latents, vocabulary):
    [latent] = [latent for latent in latents if latent.name == "after-1"]
    ids = np.full(2 * CTX_LEN, token_of(" x", vocabulary), np.uint32)
    ids[CTX_LEN - 1], ids[CTX_LEN] = token_of(".", vocabulary), token_of("append", vocabulary)
    one = Truth.of(contexts_of(ids), [latent], vocabulary, seed=0)
    two = Truth.of(contexts_of(ids, (0, 1)), [latent], vocabulary, seed=0)
    assert one.places[one.active[0]].tolist() == [CTX_LEN]
    assert two.places[two.active[0]].tolist() == []


def test_levels_have_an_exact_one_and_five_of_noise():
    assert [level.coder for level in LEVELS if level.share == 0] == [EXACT]
    assert sum(level.kind == "moved" and level.share > 0 for level in LEVELS) >= 5


@pytest.fixture
def store(tmp_path, latents):
    record = CoderRecord(digest="d", width=len(latents), hookpoints=("planted@out",), activation="planted")
    provenance = {"planted": {"latents": to_values(latents), "coders": {EXACT: {"kind": "moved", "share": 0.0}}}}
    identity = Identity(ctx_len=4, subject_digest="s", packing="concat")
    with StoreWriter.create_or_resume(tmp_path, identity=identity, coders={EXACT: record}, provenance=provenance) as writer:
        write_vocabulary(tmp_path / "tokenizer", [b"a", b"b"], [False, False])
        writer.add_contexts([[0, 1]], [[(0, 0)]], documents=[Document(document=0, source_row=0)])
        writer.close_run()
        writer.finish()
    return tmp_path


def test_explanations_enter_as_imported_ones(store, latents):
    nothing = Examples.empty(4)
    for role in ("true", "wrong"):
        method = PlantedExplanations(PlantedConfig(role=role, store=store))
        assert method.name == role
        for number in (0, len(latents) - 1):
            blocks = dict.fromkeys(("explain", "explain_statistics", "explain_negatives", "positives", "negatives"), nothing)
            latent = LatentExamples(
                coder=EXACT,
                latent=number,
                selection_id="",
                status="ok",
                disjoint="document",
                density=0,
                max_activation=0,
                **blocks,
            )
            [row] = asyncio.run(method.explain(latent, Resources(vocabulary=open_store(store).vocabulary, seed=0)))
            expected = latents[number].explanations.get(role)
            assert row.origin == ORIGIN and row.explainer == role
            assert row.status == ("ok" if expected else "not_applicable")
            assert (row.text, row.rule) == ((expected.text, expected.rule.to_json()) if expected else (None, None))
    ids = {str(PlantedExplanations(PlantedConfig(role=role, store=store)).identity()) for role in ROLES}
    assert len(ids) == len(ROLES)


def test_a_store_without_planted_latents_is_refused(tmp_path):
    record = CoderRecord(digest="d", width=1, hookpoints=("x@out",), activation="topk")
    with StoreWriter.create_or_resume(
        tmp_path, identity=Identity(ctx_len=4, subject_digest="s", packing="concat"), coders={"sae": record}
    ) as writer:
        write_vocabulary(tmp_path / "tokenizer", [b"a"], [False])
        writer.add_contexts([[0]], [[(0, 0)]], documents=[Document(document=0, source_row=0)])
        writer.close_run()
        writer.finish()
    with pytest.raises(InputError, match="holds no planted latents"):
        planted_in(tmp_path)
