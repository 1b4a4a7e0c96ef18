"""``coder check`` on the bundled coders: read right, and read wrongly in the classic ways."""

import json

import pytest
from click.testing import CliRunner

from autointerp.cli.main import cli
from autointerp.coders.load import load_coder
from autointerp.demo import bundled
from autointerp.subject.corpus import Corpus, CorpusConfig
from autointerp.subject.fidelity import Site, measure
from autointerp.subject.model import load_subject


def check(source, *more):
    result = CliRunner().invoke(
        cli, ["coder", "check", source, "--subject", "bundled:model", "--tokens", "2048", "--json", *more]
    )
    assert result.exit_code in (0, 3), result.output
    report = json.loads(result.stdout)
    return result, {item["name"]: item["is_passed"] for item in report["checks"]}, report["fidelity"]


@pytest.mark.parametrize("source", ["bundled:sae", "bundled:sae-seed2", "bundled:skip-transcoder"])
def test_the_bundled_coders_pass(source):
    result, checks, fidelity = check(source)
    assert result.exit_code == 0 and False not in checks.values()
    assert list(checks) == ["l0", "fvu", "dead", "bias", "scale", "gain", "side", "loss", "splice"]
    assert (checks["gain"] is None) == ("transcoder" not in source)
    # The model card's figures are over all held-out modules; these are the first 2,048 tokens of them.
    assert fidelity["fvu"] == pytest.approx(0.268 if "transcoder" in source else 0.176, abs=0.03)
    assert fidelity["loss_with_error"] == pytest.approx(fidelity["loss_clean"], abs=1e-4)
    assert fidelity["loss_clean"] < fidelity["loss_spliced"] < fidelity["loss_zeroed"] and fidelity["kl"] > 0


@pytest.mark.parametrize(
    ("mistake", "failing"),
    [
        ("transposed_sae", "fvu"),
        ("transposed_transcoder", "fvu"),
        ("bias_twice_sae", "bias"),
        ("bias_from_transcoder", "bias"),
        ("pre_gain_transcoder", "gain"),
        ("norm_factor_missing_sae", "scale"),
        ("norm_factor_missing_transcoder", "scale"),
        ("wrong_side_sae", "side"),
        ("wrong_side_transcoder", "side"),
    ],
)
def test_a_mistake_fails_by_name(mistake, failing):
    result, checks, _ = check(f"tests.coder_mistakes:{mistake}")
    assert result.exit_code == 3 and checks[failing] is False
    assert f"failed: {', '.join(name for name, is_passed in checks.items() if is_passed is False)};" in result.stderr


def test_a_hook_before_the_gain_is_not_a_mistake():
    result, checks, fidelity = check("tests.coder_mistakes:pre_gain_transcoder_read_right")
    assert result.exit_code == 0 and False not in checks.values()
    assert fidelity["fvu"] == pytest.approx(0.268, abs=0.03)


def test_cache_refuses_the_absurd_and_force_overrides(tmp_path):
    arguments = [
        "cache",
        "--subject",
        "bundled:model",
        "--tokens",
        "2048",
        "--ctx-len",
        "128",
        "--out",
        str(tmp_path / "store"),
    ]
    wrong = [*arguments, "--coder", "wrong=tests.coder_mistakes:transposed_sae"]
    result = CliRunner().invoke(cli, wrong)
    assert "coder 'wrong' does not fit model.layers.2@out of" in str(result.exception)
    assert "it reconstructs worse than the mean (FVU 1." in str(result.exception) and "--force" in str(result.exception)
    assert not (tmp_path / "store").exists()
    assert CliRunner().invoke(cli, [*wrong, "--force"]).exit_code == 0


@pytest.mark.parametrize(("ctx_len", "num_tokens"), [(256, 256), (64, 256), (48, 192)])
def test_the_brief_check_finds_on_few_tokens_what_the_whole_one_does(ctx_len, num_tokens):
    subject, coder = load_subject(str(bundled("model"))), load_coder(str(bundled("sae")))
    config = CorpusConfig(source="stdlib", num_tokens=4 * ctx_len, ctx_len=ctx_len)
    corpus = Corpus(config, subject.tokenizer, num_embeddings=subject.num_embeddings)
    contexts = list(corpus.contexts())[:4]
    hookpoint = "model.layers.2@out"
    brief, whole = (
        measure(subject, coder, Site(hookpoint, hookpoint), contexts, batch_tokens=600, is_brief=is_brief)
        for is_brief in (True, False)
    )
    assert (brief.num_tokens, whole.num_tokens) == (num_tokens, 4 * ctx_len)
    assert brief.l0 == pytest.approx(whole.l0, rel=0.02) and brief.fvu == pytest.approx(whole.fvu, abs=0.03)
    assert brief.loss_clean is None and whole.loss_clean is not None


def test_inspect_says_what_is_known():
    result = CliRunner().invoke(cli, ["coder", "inspect", "bundled:skip-transcoder", "--json"])
    described = json.loads(result.stdout)
    assert described["format"] == "sparsify" and described["width"] == 2560 and described["has_skip"] is True
    assert (described["hookpoint"], described["target"]) == ("layers.2.mlp@in", "layers.2.mlp@out")
    lines = CliRunner().invoke(cli, ["coder", "inspect", "bundled:sae"]).stdout.splitlines()
    assert any(line.split() == ["subtract_b_dec", "yes"] for line in lines)
