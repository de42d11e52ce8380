"""A few foreign inputs with every change; `python -m tests.faults --full` runs the campaign."""

import pytest

from tests.faults import inputs


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good").resolve()
    if not inputs.atime_moves(folder):
        pytest.skip("this file system does not note when a file is read")
    inputs.prepare(folder)
    return folder


@pytest.mark.parametrize("case", inputs.small(0), ids=lambda case: case.name)
def test_a_foreign_input_is_met_safely(good, case):
    met = inputs.meet(case, good)
    assert not met["failures"], met


def test_the_campaign_is_large_enough_and_the_same_for_the_same_seed():
    first, again = inputs.cases(1), inputs.cases(1)
    assert [(case.name, case.seed) for case in first] == [(case.name, case.seed) for case in again]
    kinds = [case.kind for case in first]
    assert kinds.count("malformed") >= 300 and kinds.count("hostile") >= 40
