"""A case per family: source, masked model and ragged folder."""

import pytest

from helpers.ragged import SETTINGS, make_case


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread):
    """One in all tests here."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {family: make_case(family, tmp_path_factory.mktemp(family)) for family in SETTINGS}


@pytest.fixture(params=sorted(SETTINGS))
def case(request, cases):
    return cases[request.param]
