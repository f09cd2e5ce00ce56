"""docs/reading.md names files, functions and tests: all of them exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", TEXT)))
LINKED = sorted(set(re.findall(r"\]\(\.\./([^)]+)\)", TEXT)))


def test_the_page_names_something():
    assert len(NAMED) > 40


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_what_the_page_names_is_there(path, name):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^(def |class )?{name}\b", source, re.MULTILINE)


@pytest.mark.parametrize("path", LINKED)
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
