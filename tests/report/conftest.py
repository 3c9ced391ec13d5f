"""A run folder to report on."""

import pytest

from helpers.reports import make_run


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")
