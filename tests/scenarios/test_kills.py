"""A training that is killed without warning, wherever that is, and resumed ends with the bits of a whole one."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.kills import Harness, cases, held
from tests.helpers.promises import PROMISES

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def differing(tmp_path_factory, request):
    """What differs in each of the chosen cases, by name, each to come: two of them run at a time."""
    harness = Harness(tmp_path_factory.mktemp("kills"))
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.module is request.module]
    chosen = [call.params["name"] for call in calls if call]
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {name: pool.submit(held, harness, CASES[name]) for name in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if case.fast else pytest.mark.slow) for name, case in CASES.items()]
)
def test_the_same_bits_after_a_kill(differing, name):
    assert differing[name].result() == []


def test_the_points_are_as_many_as_promised():
    assert len(CASES) == len(cases()) == 64
    assert sum(len(case.kills) for case in cases()) == 70
    assert sum(len(case.kills) for case in cases() if case.fast) == 8
    assert "(eight kills; kills.py tries seventy)" in PROMISES[0][0]
