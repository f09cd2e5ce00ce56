"""Elements of the pages: values are escaped, only the package's own script may run, images are embedded."""

import base64
import hashlib
import io
import re

import pytest
from jinja2 import UndefinedError
from PIL import Image

from bas.web.elements import environment, figure, load_script, plain, render, table


def test_values_are_escaped_in_text_and_attributes():
    macro = environment().from_string('{% from "elements.html" import show %}{{ show(figure) }}')
    shown = macro.render(figure=figure(Image.new("RGB", (640, 320)), '"><script>alert(1)</script>'))
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 2
    assert 'width="320" height="160"' in shown
    data = base64.b64decode(re.search(r"base64,([^\"]+)", shown)[1])
    assert Image.open(io.BytesIO(data)).size == (320, 160)


def test_a_page_runs_the_script_that_its_policy_names_and_no_other():
    page = render("study.html", "study.js", data={"text": "</script><script>alert(1)</script>"})
    policy = re.search(r"script-src '(sha256-[^']+)'", page)[1]
    *_, script = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert policy == f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
    assert policy == load_script("study.js").hash
    assert "unsafe-inline'; script" in page
    assert "'unsafe-inline'" not in page.split("script-src")[1].split('"')[0]
    assert "alert(1)</script>" not in page


def test_a_value_that_the_page_lacks_is_an_error():
    with pytest.raises(UndefinedError):
        environment().from_string("{{ missing }}").render()


def test_settings_in_plain_words():
    assert [plain(value) for value in (True, False, None, (), ("a", "b"), 3)] == [
        "yes",
        "no",
        "not set",
        "none",
        "a; b",
        "3",
    ]
    assert table("Settings", {"seed": 0}).rows == {"seed": "0"}
