"""A training that is killed without warning, wherever that is, and resumed ends with the bits of a whole one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from kills import Harness, cases, held


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def differing(harness):
    """What differs in each of the fast cases, by name, each to come: two of them run at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {case.name: pool.submit(held, harness, case) for case in cases() if case.fast}


@pytest.mark.parametrize("name", [case.name for case in cases() if case.fast])
def test_the_same_bits_after_a_kill(differing, name):
    assert differing[name].result() == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in cases() if not case.fast], ids=lambda case: case.name)
def test_the_same_bits_after_a_kill_anywhere(harness, case):
    assert held(harness, case) == []


def test_the_points_are_as_many_as_promised():
    assert sum(len(case.kills) for case in cases()) >= 60
    assert len({case.name for case in cases()}) == len(cases())
