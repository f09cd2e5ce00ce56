"""Sixty runs of five kinds, each killed at random, resume at once and end with the bits of a whole run."""

import pytest

from tests.helpers.random_kills import KINDS, Kill, Kind, build_bench

SEED, RUNS = 0, 60
FAST = (  # inside the writing of a checkpoint's file, of the metrics, and between the last write and the clearing
    [Kill(operation="write .step-N.tmp/state.safetensors", call=2, share=0.6)],
    [
        Kill(operation="append run/metrics.jsonl", call=5, share=0.5),
        Kill(operation="write run/settings.json", share=0.5),
    ],
    [Kill(operation="remove step-N/manifest.json", call=4), Kill(operation="write run/report.html", share=0.9)],
)


@pytest.fixture(scope="module")
def kind(tmp_path_factory):
    """The kinds of training, each with its whole run, which is trained when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("random kills"), {}
    bench = build_bench(folder / "bench")

    def get(name: str) -> Kind:
        if name not in made:
            made[name] = Kind(bench, name, folder / name)
        return made[name]

    return get


@pytest.mark.parametrize("kills", FAST, ids=lambda kills: kills[0].operation)
def test_a_kill_inside_the_writing_of_a_file(kind, kills):
    wrong, fired = kind("close-ups").try_kills(kills)
    assert wrong == []
    assert fired == len(kills)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_random_kills_resume_at_once_to_the_same_bits(kind, number):
    """Each of one to three kills; the seed of run i is SEED + i."""
    chosen = kind(KINDS[number % len(KINDS)])
    kills = chosen.choose_all(SEED + number)
    assert chosen.try_kills(kills)[0] == [], "; ".join(map(str, kills))
