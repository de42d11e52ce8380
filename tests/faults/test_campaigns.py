"""A few cases of every campaign with every change; `python -m tests.faults --full` runs all."""

import json
import subprocess
import sys

import pytest

from tests.faults.common import ROOT
from tests.faults.network import refusal

CAMPAIGNS = "kills changes changes_in_background changes_of_shared_weights kills_in_saves signals cuts corruptions corruptions_of_shared_weights no_space numbers memory one_of_many nodes".split()


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_nothing_is_lost(name, tmp_path):
    if name == "nodes" and (reason := refusal()):
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.faults", "--only", name, "--output", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    assert rows and all(row["tried"] and row["held"] == row["tried"] for row in rows)
