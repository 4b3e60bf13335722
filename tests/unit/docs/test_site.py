"""The generated pages and pictures, the table of claims, and the site that MkDocs builds of them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from headrace.platform.config.schema import key_types
from headrace.workers.memory.config import MemoryPreset

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, as MkDocs loads it."""
    spec = importlib.util.spec_from_file_location("headrace_docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_has_every_key_once(generate: ModuleType) -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", generate.configuration_page(), flags=re.MULTILINE)
    leaves = {key for key, kind in key_types().items() if not kind.is_branch or kind.kind is dict}
    assert sorted(key for key, _ in rows) == sorted(leaves)
    texts = dict(rows)
    assert texts["train.steps"] == "optimizer steps of the whole run (a resumed run continues to the same number)."
    assert texts["optim.beta2"] == texts["optim.beta1"] == "decay of the two moments."
    assert texts["train.device"].startswith("`auto` takes CUDA")  # an enumeration speaks for its key


def test_a_key_without_a_meaning_ends_the_build(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Undocumented:
        """No arguments here."""

        steps: int = 1

    monkeypatch.setattr(generate, "key_types", lambda: {"steps": key_types()["train.steps"]})
    with pytest.raises(ValueError, match=r"Undocumented\.steps has no line under `Args:`"):
        generate._section(Undocumented, "", "Undocumented")


def test_pictures_are_drawn_from_the_code(generate: ModuleType) -> None:
    drawn = {name: draw() for name, draw in generate.PICTURES.items()}
    for name, text in drawn.items():
        ElementTree.fromstring(text)
        assert f"pictures/{name}.svg" in (DOCS / "pages" / "concepts.md").read_text()
    assert (
        drawn["grid"].count('fill="#e07a5f"') == 4 * 2 + 1
    )  # a quarter of 8 chunks on the drive in 4 layers, and the key
    assert [name in drawn["skeleton"] for name in ("gate_up", "residual 8", "lse 0.125")] == [True] * 3
    cells = re.findall(r">(\d+)</text>", drawn["sweeps"])
    assert [cells.index("2"), cells[16:].index("2")] == [1, 4]  # by layer: the next chunk; by chunk: the next layer


def test_the_claims_name_every_preset_and_every_benchmark() -> None:
    text = (DOCS / "pages" / "reference" / "claims.md").read_text()
    named = set(re.findall(r"`(?:memory=)?(\w+)`", text))
    assert {preset.value for preset in MemoryPreset} <= named
    rows = {folder.name for folder in (ROOT / "tests" / "bench" / "results").iterdir()}
    assert rows == {name for name in re.findall(r"`([\w-]+)`", text) if name in rows}


def test_the_measured_page_counts_what_was_met(generate: ModuleType) -> None:
    page = generate.measured_page()
    assert "| kernels | 2026-11-25 | `75b30a7fa` | 2 CPU cores, no GPU | bit for bit the reference | 8 of 8 |" in page
    assert "| length (cut short) |" in page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    folder = tmp_path_factory.mktemp("built") / "site"
    mkdocs = ROOT / ".venv-docs" / "bin" / "mkdocs"
    if not mkdocs.exists():
        pytest.skip("MkDocs is not installed here; `make docs` makes .venv-docs with it")
    words = [str(mkdocs), "build", "--strict", "--quiet", "-f", str(DOCS / "mkdocs.yml"), "-d", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's advice on its successor
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=quiet)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_the_site_has_all_pages_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {"index.html", "guides/cluster.html", "reference/configuration.html", "reference/changelog.html"} <= pages
    for page in pages:
        text = (site / page).read_text()
        loaded = re.findall(r'<(?:script|img)[^>]+src="([^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="([^"]+)"', text)
        assert not [url for pair in loaded for url in pair if "//" in url], page


# Opens each page in a frame as wide as a phone; says what is wider than the frame, and which links lead nowhere.
PHONE = """<pre id="said"></pre><script>
async function look(page) {
  const frame = document.createElement("iframe");
  frame.width = 390; frame.height = 844; frame.src = page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const inside = frame.contentDocument, root = inside.documentElement, broken = [];
  for (const link of inside.querySelectorAll("article a[href]")) {
    const url = new URL(link.href);
    if (url.origin != location.origin) continue;
    const answer = await fetch(url.pathname);
    const target = url.hash.slice(1), text = answer.ok && target ? await answer.text() : "";
    if (!answer.ok || (target && !text.includes(`id="${target}"`))) broken.push(link.href);
  }
  const images = [...inside.images].filter(image => !image.naturalWidth).map(image => image.src);
  const found = {page, title: inside.title, width: root.scrollWidth, broken, images};
  frame.remove();
  return found;
}
(async () => {
  const found = [];
  for (const page of PAGES) found.push(await look(page));
  document.getElementById("said").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.mark.soak
def test_a_browser_shows_every_page_at_the_width_of_a_phone(site: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed here")
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if page.name != "404.html")
    (site / "phone.html").write_text(PHONE.replace("PAGES", json.dumps(pages)))
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        words += ["--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom"]
        url = f"http://127.0.0.1:{server.server_address[1]}/phone.html"
        done = subprocess.run([*words, url], capture_output=True, text=True, check=True, timeout=170)
        server.shutdown()
    said = re.search(r'<pre id="said">(.*?)</pre>', done.stdout)
    assert said is not None
    assert said[1], "the browser has not come to an end"
    found = json.loads(said[1].replace("&amp;", "&"))
    assert [row["page"] for row in found] == pages
    assert [
        row for row in found if row["broken"] or row["images"] or not row["title"] or not 0 < row["width"] <= 390
    ] == []
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
