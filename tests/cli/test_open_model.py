"""Which model a command opens: the one that is named, or the miniature, which is told."""

import logging

import pytest

from bas.cli.entry import build_parser
from bas.cli.open_model import find_model
from bas.pretrained.hub import WEIGHTS, find
from tests.helpers.tiny import refused


def found(command, *words):
    return find_model(build_parser(command).parse_args([command, *map(str, words)]))


def test_without_a_run_the_miniature_is_told(bench, caplog):
    caplog.set_level(logging.INFO)
    assert found("sample", "--prompt", "a bowl", "no such file.safetensors", "beach/at night") == WEIGHTS / "mini"
    assert found("explore", "--contexts", "at the beach", "in a box") == find(None)
    assert caplog.messages == ["no RUN is named: the miniature generates the images"] * 2
    caplog.clear()
    assert found("sample", bench.model, "--prompt", "a bowl", bench.model) == bench.model
    assert found("sample", "mini", "--prompt", "a bowl") == WEIGHTS / "mini"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["sample", "--prompt", "a red car"], "--prompt"),
        (["sample", "--prompt", "a", "--lora", "style.safetensors"], "--lora"),
        (["vary", "--embedding", "toy.safetensors"], "--embedding"),
        (["explore", "--contexts", "at the beach"], "--contexts"),
    ],
)
def test_a_run_that_a_flag_takes_is_no_value_of_it(bench, tmp_path, words, flag):
    unfinished, file = tmp_path / "my run", tmp_path / "model.safetensors"
    unfinished.mkdir()
    (unfinished / "settings.json").write_text("{}")
    file.touch()
    for run, shown in [(bench.model, bench.model), ("sd21-base", "sd21-base"), (unfinished, f"'{unfinished}'")]:
        with refused(f"{flag} takes {shown} as its own, and no RUN is named: write {shown} before {flag}"):
            found(*words, run)
    if flag in ("--prompt", "--contexts"):
        with refused(f"{flag} takes {file} as its own"):
            found(*words, file)
    else:
        assert found(*words, file) == WEIGHTS / "mini"
    assert found(words[0], unfinished, *words[1:], bench.model) == unfinished
