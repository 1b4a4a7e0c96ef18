"""Status and verify, from the folder alone."""

import asyncio

import jobs_standins as standins
import pytest

from autointerp import tables
from autointerp.errors import StoreError, Transient
from autointerp.files import read_json, write_json
from autointerp.jobs.explain import ExplainConfig, explain_from
from autointerp.jobs.plan import extend_plan
from autointerp.jobs.score import ScoreConfig, score_from
from autointerp.jobs.shards import Leases
from autointerp.jobs.status import status
from autointerp.jobs.verify import verify
from autointerp.results.folder import ResultsFolder


def flaky(request):
    return Transient("busy") if "a 3 " in request.prompt.messages[0][1] else standins.script(request)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r"

    async def run():
        config = ExplainConfig(store="x", results=path, latents="0-9", coders=("a",), shard_latents=4)
        await explain_from(config, standins.Source(), standins.Explainer(), standins.FakeEngine(flaky), progress=False)
        await score_from(
            ScoreConfig(results=path, latents="0-3"), standins.Source(), [standins.Scorer()], standins.engine(), progress=False
        )

    asyncio.run(run())
    return path


def test_status(path):
    folder = ResultsFolder.open(path)
    extend_plan(folder, {"a": range(10, 30)}, shard_latents=10)
    leases = Leases(folder.leases)
    label = folder.methods("explain")[0].label
    leases.acquire(f"explain/{label}/shard-000003")
    found = status(path)
    leases.close()
    explain, score = found.methods
    assert (found.num_planned, found.num_requested, found.num_plan_shards) == (30, 30, 5)
    assert (explain.num_done, explain.num_partial, explain.num_leased, explain.num_left) == (2, 1, 1, 1)
    assert (explain.num_finished, explain.num_latents) == (9, 30)
    assert explain.rows_by_status == {"no_reply": 1, "ok": 8, "too_few_examples": 1}
    assert explain.failures == explain.errors == {"Transient": 1}
    assert (explain.num_sent, explain.num_failed) == (9, 1) and explain.usage["prompt_tokens"] > 0
    assert explain.shards_per_hour > 0 and explain.eta_s > 0
    assert (score.num_done, score.num_partial, score.explainer) == (0, 1, label)
    assert not found.is_complete
    text = found.text()
    assert "2 of 5 done, 1 partial, 1 in work, 1 left" in text and "failures   1 Transient" in text and "shards/h" in text


def test_status_of_nothing(tmp_path):
    with pytest.raises(StoreError, match="cannot read results"):
        status(tmp_path)
    ResultsFolder.create(tmp_path / "r", store_id="s", provenance={})
    assert "nothing was started yet" in status(tmp_path / "r").text()


def test_verify_finds_damage(path):
    assert verify(path) == []
    file = sorted((path / "explanations").rglob("*.parquet"))[0]
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"x")
    assert "its digest differs" in verify(path)[0]
    file.unlink()
    assert "is missing; remove the marker" in verify(path)[0]
    file.write_bytes(good)
    assert verify(path) == []


def test_verify_derives_ids_anew(path):
    """Rows that were changed together with their marker are still found out."""
    marker = sorted((path / "state" / "explain").rglob("shard-000000.json"))[0]
    values = read_json(marker)
    file = path / values["tables"]["explanations"]["path"]
    rows = tables.explanations_from(tables.read_parquet(file))
    tables.write_parquet(file, tables.explanations_table([row.with_(text="better") for row in rows]))
    from autointerp.digest import digest_file

    values["tables"]["explanations"]["digest"] = digest_file(file)
    write_json(marker, values)
    assert any("4 explanations are not what their explanation_id is the digest of" in problem for problem in verify(path))
    tables.write_parquet(file, tables.explanations_table(rows[:2]))
    values["tables"]["explanations"] |= {"digest": digest_file(file), "num_rows": 2}
    values |= {"status": "done", "num_finished": 2}
    write_json(marker, values)
    assert any("is done and 2 of its 4 latents have no row" in problem for problem in verify(path))


def test_verify_names_strays(path):
    (path / "scores" / "notes.txt").touch()
    assert verify(path) == ["scores/notes.txt is not parquet and lies in a table folder; move it away"]


def test_a_damaged_marker_is_named(path):
    marker = sorted((path / "state" / "explain").rglob("shard-000000.json"))[0]
    marker.write_text("{")
    assert "is not valid JSON" in verify(path)[0]
    write_json(marker, {"schema": 1, "tables": {}})
    assert "is not a marker" in verify(path)[0]
