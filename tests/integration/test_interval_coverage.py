"""A short run of the simulation behind docs/intervals.md: no interval falls below the bound it states there."""

import re

import pytest

from benchmarks import interval_coverage as coverage

BOUND = 0.90
SLACK = 0.03  # four standard errors of 400 draws at 0.95 to 0.97


def test_exact_tables_hold_the_bound():
    for table in (coverage.rates(), coverage.worst_rate(), coverage.balanced()):
        assert table.worst() >= BOUND, table.title


@pytest.mark.parametrize("draw", [coverage.binormal, coverage.exponential, coverage.levels])
def test_auroc_holds_the_bound(draw):
    assert coverage.areas(draw, "", 400, 1).worst() >= BOUND - SLACK


def test_clustered_correlation_and_summary_intervals_hold_the_bound():
    assert coverage.clustered(150, with_effect=True).worst() >= BOUND - 2 * SLACK
    for what in ("balanced accuracy", "AUROC"):
        assert coverage.documents(100, what=what).worst() >= BOUND - 2.5 * SLACK
    assert coverage.correlations(150).worst() >= BOUND - 2 * SLACK
    assert coverage.summaries(400).worst() >= BOUND - SLACK


def test_the_committed_tables_are_those_of_the_script():
    text = coverage.DOC.read_text(encoding="utf-8")
    for table in (coverage.rates(), coverage.worst_rate(), coverage.balanced()):
        assert table.markdown() in text
    assert len(re.findall("^## ", text, re.MULTILINE)) == 13
