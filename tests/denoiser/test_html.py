"""The page in a real browser: `make test-browser`, with Chromium on the path. What it shows at a pass is what that pass had."""

import html.parser
import json
import pathlib
import shutil
import subprocess

import pytest

from dlm_kernels import cli


class Page(html.parser.HTMLParser):
    """The spans of each column's <pre>: [[(class, style, text), ...], ...], its headings and the range input's attributes."""

    def __init__(self, text):
        super().__init__()
        self.columns, self.headings, self.slider, self.inside = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "pre":
            self.columns.append([])
        elif tag == "input":
            self.slider = attributes
        elif tag == "span" and self.columns:
            self.columns[-1].append([attributes.get("class", ""), attributes.get("style", ""), ""])
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "span" and self.columns:
            self.columns[-1][-1][2] += data
        elif self.inside == "h2":
            self.headings.append(data)


@pytest.fixture
def page(saved, tmp_path, capsys):
    path = tmp_path / "out.html"
    arguments = ["generate", "def add(", "--model", str(saved), "--block", "6", "--steps", "3", "--exact", "--json"]
    assert cli.main([*arguments, "--html", str(path)]) == 0
    return path, json.loads(capsys.readouterr().out)


def test_the_page_parses_and_loads_nothing(page):
    """What the script needs to find is there, once, and no address is in it."""
    path, _ = page
    text = path.read_text()
    parsed = Page(text)
    assert parsed.slider["id"] == "pass" and parsed.slider["type"] == "range"
    for name in ('id="play"', "<main>", 'id="data"'):
        assert text.count(name) == 1
    assert "http" not in text and "src=" not in text and "@import" not in text


@pytest.mark.browser
def test_chromium_shows_each_pass(page, tmp_path):
    path, numbers = page
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "expected Chromium on the path"
    # No network, and no sandbox: as root it has none.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    options += ["--no-first-run", "--disable-component-update", f"--user-data-dir={tmp_path}/profile", "--window-size=1200,700"]

    def open_(at, *more):
        command = [browser, *options, *more, f"{path.as_uri()}#{at}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    for at, left, right in ((0, 6, 6), (1, 4, 5), (3, 0, 3), (6, 0, 0)):
        parsed = Page(open_(at, "--dump-dom"))
        masked = [sum(style == "mask" for style, _, _ in column) for column in parsed.columns]
        assert masked == [left, right]
        assert parsed.headings == [f"Block by block: pass {min(at, 3)} of 3", f"Token by token: pass {at} of 6"]
        written = [cell for cell in parsed.columns[0] if cell[0] not in ("mask", "given")]
        assert all("color: " in style for _, style, _ in written)
        assert sum(name == "new" for name, _, _ in written) == (2 if at in (1, 3) else 0 if at == 0 else 2)
    assert "".join(word for _, _, word in parsed.columns[0]) == numbers["text"]
    picture = tmp_path / "page.png"
    open_(3, f"--screenshot={picture}")
    assert pathlib.Path(picture).read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000
