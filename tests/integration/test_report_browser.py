"""The report in a real browser, from disk: scripts run, hostile text does not, thousands of rows sort and filter."""

import html
import json
import re
import shutil
import subprocess

import pytest

from autointerp.reports import write_report
from tests.report_folder import build

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=10000",
]  # fmt: skip
PROBE = """
addEventListener("load", () => {
  const byId = (id) => document.getElementById(id);
  const cells = (n) => [...byId("latents").tBodies[0].rows].map((row) => row.cells[n].textContent);
  const header = (name) => [...document.querySelectorAll("#latents thead button")].findIndex((b) => b.textContent === name);
  const press = (name) => document.querySelectorAll("#latents thead button")[header(name)].click();
  const fill = async (id, value) => {
    byId(id).value = value;
    byId(id).dispatchEvent(new Event("input", { bubbles: true }));
    await new Promise((resolve) => setTimeout(resolve, 200));
    return byId("count").textContent;
  };
  (async () => {
    const out = { rows: cells(0).length, count: byId("count").textContent };
    const score = header("detection default");
    press("detection default");
    out.sorted = cells(score).map((text) => parseFloat(text));
    out.order = document.querySelectorAll("#latents thead th")[score].getAttribute("aria-sort");
    press("detection default");
    out.ascending = cells(score).map((text) => parseFloat(text));
    out.hostile = await fill("q", "onmouseover pwned");
    out.none = await fill("q", "no such words");
    await fill("q", "");
    out.coder = await fill("f-coder", "1");
    out.coders = [...new Set(cells(0))];
    await fill("f-coder", "");
    out.low = await fill("f-max", "0.6");
    await fill("f-max", "");
    out.link = byId("latents").querySelector("tbody a").getAttribute("href");
    byId("next").click();
    out.page = byId("page").textContent;
    const result = document.createElement("div");
    result.id = "probe";
    result.textContent = JSON.stringify(out);
    document.body.append(result);
  })();
});
"""


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("this test needs chromium on the PATH: apt-get install chromium, or leave it out with -m 'not browser'")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    build(folder / "results", num_latents=12, num_shards=2, density=True)
    return write_report(folder / "results").parent


def run(chromium, tmp_path, path, *options):
    command = [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    return done.stdout.decode()


def with_probe(report, name, *, copies=1):
    """Write the index with the probe beside it and every latent `copies` times over."""
    text = (report / "index.html").read_text("utf-8")
    before, block, after = re.split(r'(?<=id="data">)(.*?)(?=</script>)', text, maxsplit=1, flags=re.S)
    data = json.loads(block)
    rows = data["rows"]
    rows["values"] = [[column * copies for column in series] for series in rows["values"]]
    rows.update({key: column * copies for key, column in rows.items() if key != "values"})
    escaped = json.dumps(data).replace("<", "\\u003c")
    (report / "assets" / "probe.js").write_text(PROBE)
    page = report / name
    page.write_text(
        (before + escaped + after).replace("</head>", '<script src="assets/probe.js" defer></script></head>'), "utf-8"
    )
    return page


def probe(chromium, tmp_path, page):
    dom = run(chromium, tmp_path, page, "--dump-dom")
    found = re.search(r'<div id="probe">(.*?)</div>', dom, flags=re.S)
    assert found, dom[-2000:]
    assert "data-pwned" not in dom
    return json.loads(html.unescape(found[1]))


def test_pages_open_from_disk_and_hostile_text_stays_text(chromium, report, tmp_path):
    for path in (report / "index.html", report / "latents" / "sae" / "3.html"):
        dom = run(chromium, tmp_path, path, "--dump-dom")
        assert "<html" in dom and "data-pwned" not in dom
        # Set by theme.js once it runs: the content policy lets the report's own scripts through.
        assert re.search(r'<button type="button" class="theme" aria-label="Use (dark|light) colours">', dom)
    assert 'data-ready="true"' in run(chromium, tmp_path, report / "index.html", "--dump-dom")


def test_content_policy_stops_a_script_that_got_in(chromium, report, tmp_path):
    page = report / "attacked.html"
    text = (report / "index.html").read_text("utf-8")
    page.write_text(text.replace("<main", '<img src="x" onerror="document.documentElement.dataset.pwned = 1"><main'), "utf-8")
    dom = run(chromium, tmp_path, page, "--dump-dom")
    page.unlink()
    assert 'data-ready="true"' in dom and "data-pwned" not in dom


def test_table_sorts_filters_and_pages(chromium, report, tmp_path):
    found = probe(chromium, tmp_path, with_probe(report, "probe.html"))
    assert found["rows"] == 24 and found["count"] == "24 of 24 latents"
    known = [value for value in found["sorted"] if value is not None]
    assert found["order"] == "descending" and known == sorted(known, reverse=True) and len(known) == 18
    # What has no score comes last, whichever way.
    assert found["sorted"][len(known) :] == [None] * 6 == found["ascending"][len(known) :]
    assert [value for value in found["ascending"] if value is not None] == sorted(known)
    assert found["hostile"] == "2 of 24 latents" and found["none"] == "0 of 24 latents"
    assert found["coder"] == "12 of 24 latents" and found["coders"] == ["transcoder"]
    assert found["low"] == f"{sum(value <= 0.6 for value in known)} of 24 latents"
    assert (report / found["link"]).is_file()


def test_table_of_ten_thousand_rows(chromium, report, tmp_path):
    found = probe(chromium, tmp_path, with_probe(report, "large.html", copies=420))
    assert found["count"] == "10,080 of 10,080 latents" and found["rows"] == 100
    assert found["page"] == "page 2 of 101"


def test_light_and_dark_are_drawn(chromium, report, tmp_path):
    sizes = {}
    for scheme in (0, 1):  # 0 is dark
        picture = tmp_path / f"{scheme}.png"
        options = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1366,900", f"--screenshot={picture}"]
        run(chromium, tmp_path, report / "latents" / "sae" / "24.html", *options)
        sizes[scheme] = picture.read_bytes()
        assert len(sizes[scheme]) > 50_000
    assert sizes[0] != sizes[1]
