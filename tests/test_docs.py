"""The pages: programs print what they show, links lead somewhere, every public name has an example that runs."""

import doctest
import inspect
import re

import pytest

import kondo_hooks as kondo
from tests import forks
from tests.forks import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PROGRAMS = ["getting-started", "will-it-pay", "choose"]
PROGRAM = re.compile(r"```python\n(.*?)```(?:\n```\n(.*?)```)?", re.S)


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_print_what_the_page_shows(page, tmp_path):
    found = PROGRAM.findall((DOCS / f"{page}.md").read_text())
    assert found
    path = tmp_path / "program.py"
    path.write_text("\n".join(code for code, _ in found))
    done = forks.program(path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    if shown := "".join(told for _, told in found):
        assert done.stdout == shown


def test_the_program_on_how_it_works_is_the_tested_one():
    code = (DOCS / "reference.py").read_text()
    assert code[code.index("import torch") :].rstrip() in (DOCS / "how-it-works.md").read_text()


def anchors(page):
    heads = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "")).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", page.read_text()):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), (target, anchor)


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if f"{page.relative_to(DOCS)}\n" not in menu] == []


def public():
    """(name, object) of all that a user is given."""
    yield from ((name, getattr(kondo, name)) for name in kondo.__all__ if name != "rules")
    for name in ("preselect", "select", "logp", "force", "groups", "flush", "state_dict", "report"):
        yield f"Gated.{name}", getattr(kondo.Gated, name)
    for name in kondo.rules.__all__:
        found = getattr(kondo.rules, name)
        if inspect.isfunction(found):
            yield f"rules.{name}", found


@pytest.mark.parametrize(("name", "found"), public(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_public_name_has_an_example_that_runs(name, found):
    (example,) = doctest.DocTestFinder(recurse=False).find(found, name, globs={})
    assert example.examples, f"{name} has no example"
    told = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append, clear_globs=False)
    assert not told, "".join(told)


def test_every_public_name_is_in_the_reference():
    page = (DOCS / "api.md").read_text()
    assert [name for name in kondo.__all__ if f"::: kondo_hooks.{name}\n" not in page] == []
