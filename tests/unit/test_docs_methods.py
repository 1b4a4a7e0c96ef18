"""Every scorer has a page that says what one must know before trusting its numbers, and every explainer a section."""

import re
from pathlib import Path

import pytest

from autointerp.explainers import REGISTRY as EXPLAINERS
from autointerp.jobs.methods import build_scorer
from autointerp.scorers import REGISTRY as SCORERS
from autointerp.scorers.intruder import IntruderConfig
from autointerp.scorers.metrics import CHANCE
from autointerp.scorers.saebench import NUM_SILENT, NUM_TOP, NUM_WEIGHTED

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.name: page.read_text() for page in sorted((DOCS / "methods").glob("*.md"))}
SECTIONS = ["Asks", "Costs", "Chance", "Misleads", "Paper"]


def table():
    """Rows of the table of methods by scorer: the page, then the cells after the first."""
    rows = {}
    for line in PAGES["README.md"].splitlines():
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        if link := re.fullmatch(r"\[([\w, ]+)\]\((\w+\.md)\)", first):
            rows |= {name: (link[2], *others) for name in link[1].split(", ")}
    return rows


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_has_a_page_with_every_section(scorer):
    text = PAGES[table()[scorer][0]]
    assert text.startswith("# ")
    assert [name for name in SECTIONS if re.search(rf"^\*\*{name}\b[^*]*\*\*", text, re.MULTILINE)] == SECTIONS


def test_every_page_is_in_the_table():
    assert {page for page, *_ in table().values()} == PAGES.keys() - {"README.md"}
    assert set(table()) == {*SCORERS, "simulation_list"}


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_table_says_what_the_code_does(scorer):
    _, measures, needs, headline, chance, _ = table()[scorer]
    built = build_scorer(scorer, {})
    assert headline.lower().replace(" ", "_") == built.headline
    own = {"intruder": 1 / IntruderConfig().num_shown, "saebench": NUM_SILENT / (NUM_TOP + NUM_WEIGHTED + NUM_SILENT)}
    assert float(chance) == pytest.approx(own[scorer] if scorer in own else CHANCE[built.headline], abs=5e-4)
    assert ("LM" in needs, "embedder" in needs) == (built.needs.engine, built.needs.embedder)
    assert ("log-probabilities" in needs) == built.needs.prompt_logprobs
    assert measures == ("explanation" if built.needs.explanation else "latent")


def test_every_explainer_has_a_section():
    sections = re.findall(r"^## (\w+)$", (DOCS / "explainers.md").read_text(), re.MULTILINE)
    assert set(EXPLAINERS) <= set(sections)
