"""The page of `biovfm report` in a browser without a network: Chromium, and axe-core where it is found."""

import importlib.util
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.test_report import encoder_file, full  # noqa: F401 - fixtures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-extensions", "--enable-logging=stderr",
)  # fmt: skip
RULES = """
const shown = document.createElement("pre");
shown.id = "axe";
axe.run(document, {resultTypes: ["violations"]}).then(
  (found) => { shown.textContent = JSON.stringify({
    violations: found.violations.map((one) => [one.id, one.help, one.nodes.map((node) => node.html)]),
    passes: found.passes.length}); },
  (error) => { shown.textContent = JSON.stringify({violations: [String(error)], passes: 0}); },
).then(() => document.body.append(shown));
"""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"), pytest.mark.xdist_group("report")
]  # fmt: skip


def browse(page, folder, *options):
    """Open a page; returns what the browser printed and what it logged."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def asked_by_page(log):
    """Addresses that a page asked for; the browser's own services have no initiator, and the page opened is a file."""
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    return {of["url"] for of in asked if of.get("initiator", "not an origin") != "not an origin"}


def axe_file():
    """axe-core's script, of a package that carries it."""
    places = [ROOT / "node_modules/axe-core/axe.min.js"]
    for package in ("axe_core_python", "axe_playwright_python"):
        found = importlib.util.find_spec(package)
        places += [Path(place) / "axe.min.js" for place in found.submodule_search_locations or []] if found else []
    return next((place for place in places if place.is_file()), None)


def test_the_page_opens_without_an_error_and_asks_no_host_for_anything(full, tmp_path):  # noqa: F811
    log = tmp_path / "net.json"
    shown, said = browse(full[1], tmp_path, f"--log-net-log={log}", "--dump-dom")
    assert "Nearest neighbours" in shown
    # What a page's scripts, its policy and its broken resources have to say is logged as CONSOLE.
    assert "CONSOLE" not in said
    assert not asked_by_page(log)


def test_an_error_and_a_request_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<!DOCTYPE html><img src="http://127.0.0.1:9/x.png"><script>missing()</script>')
    log = tmp_path / "net.json"
    _, said = browse(page, tmp_path, f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" in said
    assert "http://127.0.0.1:9/x.png" in asked_by_page(log)


def test_an_automatic_check_finds_nothing_that_shuts_people_out(full, tmp_path):  # noqa: F811
    axe = axe_file()
    if axe is None:
        pytest.skip("axe-core is not installed (axe-core-python, or node_modules/axe-core)")
    # The policy of the page would keep the check itself from running.
    text = re.sub(r"<meta http-equiv=.*\n", "", full[1].read_text())
    script = axe.read_text(encoding="utf-8").replace("</script", "<\\/script") + RULES
    page = tmp_path / "checked.html"
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    shown, _ = browse(page, tmp_path, "--virtual-time-budget=60000", "--dump-dom")
    found = json.loads(unescape(re.search(r'<pre id="axe">(.*?)</pre>', shown, re.DOTALL)[1]))
    assert found["violations"] == []
    assert found["passes"] > 15
