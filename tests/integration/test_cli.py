"""The command line as a user meets it: arguments in, exit code and one sentence out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from autointerp.cli.main import COMMANDS, main
from autointerp.demo import bundled
from autointerp.demo.run import cache_settings
from autointerp.jobs.cache import CacheConfig, cache
from autointerp.records import UNSCORED
from autointerp.results.load import load_explanations, load_scores, load_verdicts
from autointerp.store.reader import open_store
from tests.killing import scripted_server

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 24_576


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A small store of the bundled model."""
    path = tmp_path_factory.mktemp("cli") / "store"
    cache(CacheConfig.parse(cache_settings(path, NUM_TOKENS)))
    return path


def one_sentence(result, *parts, code=2):
    """Assert that a command ended with one line that holds all `parts`."""
    found, _, err = result
    assert found == code, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("autointerp: ") and "Traceback" not in err
    for part in parts:
        assert part in line, line
    return line


class TestHelp:
    @pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("import", "delphi"), ("coder", "check")])
    def test_keeps_the_lines_of_its_examples(self, run, command):
        _, out, _ = run(*command, "--help")
        assert "\\b" not in out and "\b" not in out
        if command == ("cache",):
            lines = [line.strip() for line in out.splitlines()]
            assert any(line.startswith("neurons:MODULE[?k=32][&rotate=SEED]   an MLP's") for line in lines)
            assert any(line.startswith("random-coder     NAME-random") for line in lines)

    def test_lists_every_command_without_importing_anything_heavy(self):
        code = "import sys; from autointerp.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        code += (
            "print(sorted(m for m in ('torch','transformers','vllm','openai','pyarrow','pandas','numpy') if m in sys.modules))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for name in COMMANDS:
            assert f"  {name} " in out
        assert out.strip().endswith("[]")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_explains_itself(self, run, name):
        code, out, _ = run(name, "--help")
        assert code == 0 and out.startswith(f"Usage: autointerp {name}") and len(out.splitlines()) > 5

    def test_a_near_miss_is_named(self, run):
        code, _, err = run("exlpain")
        assert code == 2 and "did you mean 'explain'?" in err


class TestBadInput:
    def test_no_such_subject(self, run, tmp_path):
        result = run(
            "cache", "--subject", tmp_path / "nowhere", "--corpus", "stdlib", "--coder", "sae=bundled:sae", "--out", "s"
        )
        one_sentence(result, "nowhere")

    def test_no_such_store(self, run):
        one_sentence(run("explain", "cache/nowhere", "--explainer", "lexical"), "cache/nowhere")

    def test_no_such_results(self, run):
        one_sentence(run("score", "results/nowhere", "--judge", "rule"), "results/nowhere")
        one_sentence(run("status", "results/nowhere"), "results/nowhere")

    def test_a_coder_that_does_not_fit_the_hookpoint(self, run):
        args = ["--subject", "bundled:model", "--corpus", "stdlib", "--tokens", 4096, "--out", "s"]
        result = run("cache", *args, "--coder", "sae=bundled:sae@@model.layers.2.mlp.down_proj@in")
        one_sentence(result, "192", "512")

    def test_an_unknown_hookpoint(self, run):
        args = ["--subject", "bundled:model", "--corpus", "stdlib", "--tokens", 4096, "--out", "s"]
        one_sentence(run("cache", *args, "--coder", "sae=bundled:sae@@model.layer.2@out"), "model.layer.2", "model.layers.2")

    def test_an_empty_corpus(self, run, tmp_path):
        (tmp_path / "corpus").mkdir()
        args = ["--subject", "bundled:model", "--coder", "sae=bundled:sae", "--out", "s"]
        one_sentence(run("cache", *args, "--corpus", tmp_path / "corpus"), "corpus")
        (tmp_path / "corpus" / "blank.txt").write_text("")
        one_sentence(run("cache", *args, "--corpus", tmp_path / "corpus"), "corpus")

    def test_unknown_settings_name_the_nearest(self, run, store):
        one_sentence(run("explain", store, "--explainer", "lexicla"), "did you mean 'lexical'?")
        one_sentence(
            run("explain", store, "--explainer", "lexical", "--set", "selektion.window=3"), "did you mean 'selection'?"
        )
        one_sentence(
            run("score", make_results(run, store), "--judge", "rule", "--scorer", "detecton"), "did you mean 'detection'?"
        )

    def test_a_latent_that_does_not_exist(self, run, store):
        one_sentence(run("explain", store, "--explainer", "lexical", "--latents", "0-99999"), "99999")

    def test_a_results_folder_of_another_store(self, run, store, tmp_path):
        results = make_results(run, store)
        other = tmp_path / "other"
        cache(CacheConfig.parse(cache_settings(other, NUM_TOKENS - 4096, coders=("sae",))))
        one_sentence(run("explain", other, "--out", results, "--explainer", "lexical", "--latents", "random:3"), "store")

    def test_no_api_key(self, run, store, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        result = run("explain", store, "--engine", "openai:gpt@https://api.example.com/v1", "--latents", "random:2")
        one_sentence(result, "OPENAI_API_KEY")

    def test_no_engine(self, run, store):
        one_sentence(run("explain", store, "--latents", "random:2"), "--engine")

    def test_server_down(self, run, store):
        settings = ["--set", "engine_options.stop_after_s=0.5", "--set", "engine_options.backoff_s=0.05"]
        settings += ["--set", "engine_options.stop_after_failures=3"]
        result = run("explain", store, "--engine", "openai:m@http://127.0.0.1:9/v1", "--latents", "random:2", *settings)
        one_sentence(result, "127.0.0.1:9", code=4)

    def test_a_prompt_file_with_an_unknown_variable(self, run, store, tmp_path):
        text = ((ROOT / "prompts" / "explain" / "default.toml").read_text()).replace("{{", "{{nonsense}} {{", 1)
        (tmp_path / "mine.toml").write_text(text)
        result = run(
            "explain", store, "--engine", "openai:m@http://127.0.0.1:9/v1", "--set", f"options.prompt={tmp_path}/mine.toml"
        )
        one_sentence(result, "nonsense", "mine.toml")

    def test_a_tokenizer_that_does_not_match(self, run, tmp_path):
        subject = tmp_path / "subject"
        shutil.copytree(bundled("model"), subject)
        config = json.loads((subject / "config.json").read_text())
        (subject / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
        weights = load_file(subject / "model.safetensors")
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:1000].clone()
        save_file(weights, subject / "model.safetensors", metadata={"format": "pt"})
        args = ["--subject", subject, "--coder", "sae=bundled:sae@@layers.2@out", "--tokens", 4096, "--out", "s"]
        one_sentence(run("cache", *args), "tokenizer", "1000")

    def test_a_coder_is_added_by_itself(self, run, tmp_path):
        args = ["cache", "--subject", "bundled:model", "--tokens", 4096, "--out", tmp_path / "s"]
        assert run(*args, "--coder", "sae=bundled:sae")[0] == 0
        assert run(*args, "--add-coder", "skip=bundled:skip-transcoder")[0] == 0
        assert open_store(tmp_path / "s").coder_names == ["sae", "skip"]

    def test_latents_that_never_and_always_fire(self, run, store, tmp_path):
        """A dead and a dense latent get rows with a status, and the command says so."""
        sae = tmp_path / "sae" / "layers.2"
        shutil.copytree(bundled("sae") / "layers.2", sae)
        weights = load_file(sae / "sae.safetensors")
        weights["encoder.bias"][0], weights["encoder.bias"][1] = -1e4, 1e4
        save_file(weights, sae / "sae.safetensors")
        args = ["--subject", "bundled:model", "--coder", f"sae={sae}@@layers.2@out", "--tokens", 8192, "--out", "s", "--force"]
        assert run("cache", *args)[0] == 0
        code, out, _ = run("explain", "s", "--out", "r", "--explainer", "lexical", "--latents", "0,1", "--no-control")
        assert code == 0 and "1 too_dense" in out and "1 too_few_examples" in out
        code, out, _ = run("score", "r", "--judge", "rule", "--no-control")
        assert code == 0 and "2 too_dense" in out and "2 too_few_examples" in out

    def test_a_prompt_longer_than_the_context(self, run, store, tmp_path):
        with scripted_server(tmp_path, context_tokens=1000, answer="tests.answers:answer") as (url, requests):
            code, out, err = run("explain", store, "--out", "r", "--engine", f"openai:scripted@{url}", "--latents", "random:3")
        assert code == 3 and "too_long" in out, (out, err)
        assert not requests()

    @pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting a small disk needs root")
    def test_a_full_disk(self, run, store, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("this machine does not let root mount a tmpfs")
        try:
            explain = [
                "explain",
                store,
                "--out",
                disk / "r",
                "--explainer",
                "lexical",
                "--latents",
                "random:150",
                "--no-control",
            ]
            one_sentence(run(*explain), "the disk is full")
            cache_args = ["--subject", "bundled:model", "--coder", "sae=bundled:sae@@layers.2@out", "--tokens", "65k"]
            one_sentence(run("cache", *cache_args, "--out", disk / "s"), str(disk))
            subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
            code, out, err = run(*explain)
            assert code == 0, err
        finally:
            subprocess.run(["umount", disk], check=True)


class TestHostileServer:
    TROUBLE = {
        "ok": 4, "429": 2, "503": 1, "500": 2, "drop": 2, "truncated": 2, "prose": 2, "short_list": 2, "html": 1, "empty": 1,
        "endless_thinking": 1,
    }  # fmt: skip

    def test_the_run_ends_and_counts_add_up(self, run, store, tmp_path):
        script = {"behaviours": self.TROUBLE, "headers": {"retry-after": "0.02"}, "answer": "tests.answers:answer"}
        quick = ["--set", "engine_options.backoff_s=0.01", "--set", "engine_options.backoff_cap_s=0.05", "--no-control"]
        quick += ["--set", "engine_options.max_attempts=3"]
        few = ["--set", "selection.num_positives=10", "--set", "selection.num_negatives=10"]
        with scripted_server(tmp_path, **script) as (url, requests):
            engine = ["--engine", f"openai:scripted@{url}", *quick]
            code, out, err = run("explain", store, "--out", "r", "--latents", "random:25", *few, *engine)
            assert code == 3 and "Traceback" not in err, err
            explanations = load_explanations("r")
            assert len(explanations) == 50 and explanations.status.nunique() > 2
            assert explanations.text.notna().eq(explanations.status == "ok").all()
            assert set(explanations.text.dropna().str.match(r"Tokens of \w+ near \w+\.")) == {True}
            code, out, err = run("score", "r", *engine)
            assert code == 3 and "without a verdict" in out and "Traceback" not in err, (out, err)
            assert requests()
        verdicts, scores = load_verdicts("r"), load_scores("r")
        judged = verdicts.status == "ok"
        assert verdicts.answer.notna().eq(judged).all() and (~judged).any()
        assert len(verdicts) == 20 * 2 * (explanations.status == "ok").sum()
        headline = scores[scores.is_headline & scores.negatives.eq("random")]
        asked = headline.num_scored + headline[[f"num_{reason}" for reason in UNSCORED]].sum(axis=1)
        explained = headline.explanation_id.isin(explanations.explanation_id[explanations.status == "ok"])
        assert (asked[explained] == 20).all()
        assert headline.value.notna().eq(headline.status == "ok").all()
        assert run("verify", "r")[0] == 0


def make_results(run, store):
    code, _, err = run("explain", store, "--out", "r", "--explainer", "lexical", "--latents", "random:6")
    assert code == 0, err
    return "r"


class TestWholeRuns:
    def test_a_toml_file_runs_every_stage_and_a_second_time_does_nothing(self, run, tmp_path):
        (tmp_path / "run.toml").write_text(
            """
            [cache]
            subject = "bundled:model"
            corpus = { source = "stdlib", num_tokens = 24576 }
            coders = [{ name = "sae", source = "bundled:sae", hookpoint = "layers.2@out" }]
            out = "cache/mine"

            [explain]
            explainer = "lexical"
            latents = "random:5"
            controls = ["shuffled"]

            [score]
            scorers = ["detection"]
            options = { detection = { judge = "rule" } }
            controls = ["shuffled"]

            [report]
            limit = 3
            """
        )
        code, out, err = run("run", "run.toml")
        assert code == 0, err
        assert (tmp_path / "results" / "mine" / "report" / "index.html").exists()
        code, out, err = run("run", "run.toml", "--set", "report.limit=2")
        assert code == 0 and out.count(": 0 latents") == 2, (out, err)
        one_sentence(run("run", "run.toml", "--set", "scroe.x=1"), "did you mean 'score'?")

    def test_plan_counts_what_the_run_then_sends(self, run, store, tmp_path):
        latents = [
            "--latents",
            "random:12",
            "--coder",
            "sae",
            "--set",
            "selection.num_positives=10",
            "--set",
            "selection.num_negatives=10",
        ]
        with scripted_server(tmp_path, answer="tests.answers:answer") as (url, requests):
            engine = ["--engine", f"openai:scripted@{url}"]
            code, out, err = run("plan", store, "--out", "r", *latents, *engine)
            assert code == 0, err
            planned = int(out.strip().splitlines()[-1].split()[2].replace(",", ""))
            assert not requests()
            assert run("explain", store, "--out", "r", *latents, *engine)[0] == 0
            assert run("score", "r", *engine)[0] == 0
            sent = len(requests())
        assert abs(planned - sent) <= 0.05 * sent

    def test_status_and_show_read_the_folder_alone(self, run, store):
        results = make_results(run, store)
        code, out, _ = run("status", results)
        assert code == 0 and "done" in out and "lexical" in out
        latent = load_explanations(results).iloc[0]
        code, out, _ = run("show", results, f"{latent.coder}/{latent.latent}")
        assert code == 0 and latent.text[:20] in out
        one_sentence(run("show", results, "sae"), "CODER/LATENT")
        assert run("verify", results)[0] == 0 and run("verify", store)[0] == 0

    def test_hookpoints_are_listed_by_glob(self, run):
        code, out, _ = run("cache", "--subject", "bundled:model", "--list-hookpoints", "layers.*.mlp@in")
        assert code == 0 and out.split() == [f"model.layers.{i}.mlp@in" for i in range(4)]
        one_sentence(run("cache", "--subject", "bundled:model", "--list-hookpoints", "layers.*.mpl@in"), "layers.*.mpl")
        code, out, _ = run("cache", "--subject", "bundled:model", "--list-hookpoints")
        assert code == 0 and "model.layers.2@out" in out.split()
