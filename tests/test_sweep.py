"""A tenth of the sweep over all causal types of transformers; `python -m tests.sweep` does the rest."""

import pytest
from transformers import CONFIG_MAPPING

from tests import sweep

# Every tenth type by name, a fixed choice: listing the variants too would build every configuration.
CASES = [name for name in sorted(sweep.CAUSAL_TYPES)[5::10] if name in CONFIG_MAPPING]


@pytest.mark.parametrize("case", CASES)
def test_sweep_holds_for_the_type(case, tmp_path):
    row = sweep.examine(case, tmp_path)
    assert sweep.failed_checks(row) == [], row


@pytest.mark.parametrize(
    "row, failed",
    [
        ({"built": True, "refused": True, "line": "error: no"}, []),
        ({"built": True, "refused": True}, ["refused without a reason"]),
        ({"built": True, "traceback": True, "line": "KeyError"}, list(sweep.CHECKS[1:2]) + list(sweep.CHECKS[4:])),
        ({"built": True, **dict.fromkeys(sweep.CHECKS, True), "refused": False, "equal_to_trainer": False}, ["equal_to_trainer"]),
        ({"built": True, **dict.fromkeys(sweep.CHECKS, True), "refused": False, "no_sample": ["(no sample: x)"]}, ["no sample"]),
    ],
)  # fmt: skip
def test_failed_checks_names_what_a_row_lacks(row, failed):
    assert sweep.failed_checks({"case": "x", **row}) == failed
