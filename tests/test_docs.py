"""The documentation is true as far as a machine can tell: its code runs, each line of use equals the torch line to its right, every public
name has its page, links and file names exist, figures are those of the recorded run, and a built page loads nothing from another host.

A page's blocks of Python run in order in one namespace; of sessions (pycon) the output is compared too. A block that begins with
`# needs NAME` runs where that package is installed.
"""

import doctest
import importlib.util
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import distributed

import gradkernels

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md")))}
BLOCK = re.compile(r"^```(python|pycon)(?: title=\"([^\"]*)\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)
BESIDE_TORCH = "Each line equals the torch line to its right"


FIGURE = re.compile(r"\d[\d,]*\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")


class Checker(doctest.OutputChecker):
    """Words and whole numbers have to be the same; a figure with decimals may be off by 2 %, and by anything where it is below 1e-3."""

    def check_output(self, want, got, optionflags):
        expected, found = ([float(figure.replace(",", "")) for figure in FIGURE.findall(text)] for text in (want, got))
        are_near = all(abs(a - b) <= max(0.02 * abs(a), 1e-3) for a, b in zip(expected, found, strict=False))
        want, got = (FIGURE.sub("0.5", text) for text in (want, got))
        return are_near and super().check_output(want, got, optionflags | doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def blocks_of(page):
    return [match.groups() for match in BLOCK.finditer(PAGES[page])]


LINES = [
    (page, line) for page in PAGES for _, title, block in blocks_of(page) if title == BESIDE_TORCH for line in block.splitlines() if line
]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_blocks_run_in_order(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "init_process_group" in PAGES[page]:
        # A process that is alone, without the port that torchrun would give it.
        request.getfixturevalue("process_group")
        monkeypatch.setattr(distributed, "init_process_group", lambda backend: None)
    namespace = {"__name__": "__main__"}
    torch.manual_seed(0)
    for place, (language, _, block) in enumerate(blocks_of(page)):
        needed = re.match(r"# needs (\w+)", block)
        if needed and importlib.util.find_spec(needed[1]) is None:
            continue
        if language == "pycon":
            # What is empty within an output, doctest takes for its end.
            block = re.sub(r"^$(?!\n>>>|\Z)", "<BLANKLINE>", block, flags=re.MULTILINE)
            session = doctest.DocTestParser().get_doctest(block, namespace, f"{page}, block {place}", page, 0)
            runner, said = doctest.DocTestRunner(Checker()), []
            assert runner.run(session, out=said.append, clear_globs=False).failed == 0, "".join(said)
            namespace.update(session.globs)
        else:
            exec(compile(block, f"{page}, block {place}", "exec"), namespace)


def setup_of(page):
    """The first block of a page that has lines beside torch's."""
    return blocks_of(page)[0][2]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[line.partition("(")[0] for _, line in LINES])
def test_line_equals_the_torch_line_beside_it(page, line):
    results = []
    for expression in line.split("  # "):
        namespace = {}
        torch.manual_seed(0)
        exec(setup_of(page), namespace)
        result = eval(expression, namespace)
        # What is written in place counts too.
        modules = [each for each in namespace.values() if isinstance(each, torch.nn.Module)]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        results.append((result, parameters, [parameter.grad for parameter in parameters if parameter.grad is not None]))
    ours, theirs = results
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("page", ["docs/memory.md", "docs/numerics.md"])
def test_figures_stand_in_the_recorded_table(page):
    recorded = set(re.findall(r"[\d.,e+-]+", (ROOT / "bench" / "results" / "intel-xeon.md").read_text()))
    tables = re.findall(r"^<!-- figures -->\n\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE)
    cells = [cell.strip() for table in tables for row in table.splitlines()[2:] for cell in row.strip("|").split("|")[1:]]
    assert len(cells) >= 15 and not [cell for cell in cells if cell not in recorded]


NAMES = [
    *gradkernels.__all__,
    *(f"init.{name}" for name in gradkernels.init.__all__),
    *("optim.RMSprop", "clipping.Adaptive", "clipping.Percentile", "clipping.ZScore"),
]


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_its_page(name):
    reference = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/reference/"))
    assert re.search(rf"^::: gradkernels\.{re.escape(name)}$", reference, re.MULTILINE)


FOLDERS = ("bench", "csrc", "docs", "examples", "gradkernels", "tests", "torch-ext")
FILES = [f"/{path.relative_to(ROOT)}" for path in (*ROOT.iterdir(), *(each for folder in FOLDERS for each in (ROOT / folder).rglob("*")))]


TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_of_files_and_tests_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for link in links:
        file = link.partition("#")[0]
        assert re.match(r"https?://", link) or not file or (folder / file).exists(), f"{page}: {link}"
    # A name with a placeholder, such as `csrc/math/<stem>.h`, is a rule and no file.
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|pyi|h|c|cpp|cu|cuh|sh|md|json|svg|toml|yml))`", text):
        assert any(file.endswith(f"/{name}") for file in FILES), f"{page}: {name}"
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in TESTS, f"{page}: {name}"


class Assets(HTMLParser):
    """What a page makes a browser load: addresses of scripts, styles, fonts, images, and of what is fetched ahead."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "link" and attributes.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(attributes.get("href", ""))
        elif tag != "a":
            self.addresses += [attributes[name] for name in ("src", "srcset", "data", "poster") if attributes.get(name)]


@pytest.mark.slow
def test_a_built_page_loads_nothing_from_another_host(tmp_path):
    mkdocs = ROOT / ".venv-docs" / "bin" / "mkdocs"
    if not mkdocs.exists():
        pytest.skip("mkdocs is not installed: make docs installs it")
    subprocess.run([mkdocs, "build", "--strict", "--quiet", "--site-dir", tmp_path], cwd=ROOT, check=True)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assets = Assets()
        assets.feed(page.read_text())
        assert assets.addresses
        assert not [each for each in assets.addresses if re.match(r"(\w+:)?//", each)], page
    for style in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:\w+:)?//", style.read_text()), style
