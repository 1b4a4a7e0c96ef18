"""Every scorer has a page that says what one must know before trusting its numbers, and every explainer a section."""

import re
from pathlib import Path

import pytest

from autointerp.explainers import REGISTRY as EXPLAINERS
from autointerp.jobs.methods import build_explainer, build_scorer
from autointerp.scorers import REGISTRY as SCORERS
from autointerp.scorers.intruder import IntruderConfig
from autointerp.scorers.metrics import CHANCE
from autointerp.scorers.saebench import NUM_SILENT, NUM_TOP, NUM_WEIGHTED

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.name: page.read_text() for page in sorted((DOCS / "methods").glob("*.md"))}
SECTIONS = ["Asks", "Costs", "Chance", "Misleads", "Paper"]
EXPLAINER_PARTS = ["Asks", "Costs", "Misleads", "Source"]


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
    assert parts(text, SECTIONS) == SECTIONS


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


def parts(text, names):
    """Those of `names` that begin a paragraph of the text in bold."""
    return [name for name in names if re.search(rf"(?:\A|\n\n)\*\*{name}\b[^*]*\*\*", text)]


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_every_explainer_has_a_section_with_every_part(explainer):
    page = (DOCS / "explainers.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n+(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert parts(sections[explainer], EXPLAINER_PARTS) == EXPLAINER_PARTS
    [requests] = re.findall(rf"^\|[^|]*\[{explainer}\]\(#{explainer}\)[^|]*\|[^|]*\| (.*) \|$", page, re.MULTILINE)
    assert (requests == "0") is not build_explainer(explainer, {}).needs.engine


def anchors(page):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            where = page.parent / path if path else page
            assert where.exists(), target
            assert not anchor or anchor in anchors(where), target
