"""A training that is killed without warning, wherever that is, and resumed ends with the bits of a whole one."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.kills import FEW_STEPS, PHASE_STEPS, Harness, cases, few_cases, held
from tests.helpers.promises import PROMISES

FOUND = {FEW_STEPS: few_cases(), PHASE_STEPS: cases()}  # by the steps of a phase
CASES = {steps: {case.name: case for case in found} for steps, found in FOUND.items()}


@pytest.fixture(scope="module")
def differing(tmp_path_factory, request):
    """What differs in each of the chosen cases, by steps and name, each to come: two of them run at a time."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.module is request.module]
    chosen = [(call.params["steps"], call.params["name"]) for call in calls if call]
    harnesses = {steps: Harness(tmp_path_factory.mktemp("kills"), steps) for steps in {steps for steps, _ in chosen}}
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {(steps, name): pool.submit(held, harnesses[steps], CASES[steps][name]) for steps, name in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        pytest.param(steps, name, marks=pytest.mark.slow if steps == PHASE_STEPS else (), id=f"{name} of {2 * steps}")
        for steps, found in CASES.items()
        for name in found
    ],
)
def test_the_same_bits_after_a_kill(differing, steps, name):
    assert differing[steps, name].result() == []


def test_the_points_are_as_many_as_promised():
    assert len(CASES[PHASE_STEPS]) == len(cases()) == 64
    assert sum(len(case.kills) for case in cases()) == 70
    assert sum(len(case.kills) for case in few_cases()) == 8
    assert "(eight kills; kills.py tries seventy)" in PROMISES[0][0]
