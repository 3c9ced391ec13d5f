"""A case per family: source, masked model and ragged folder."""

import pytest
import torch

from helpers.ragged import SETTINGS, make_case


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than these matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {family: make_case(family, tmp_path_factory.mktemp(family)) for family in SETTINGS}


@pytest.fixture(params=sorted(SETTINGS))
def case(request, cases):
    return cases[request.param]
