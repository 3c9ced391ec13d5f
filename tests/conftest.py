"""Fixtures that all tests may ask for lie in these modules."""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long an example takes says what else runs on the machine
settings.load_profile("untimed")

pytest.register_assert_rewrite("helpers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: beside a long one there is time for many short ones."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


pytest_plugins = [
    "helpers.models",
    "helpers.engines",
    "helpers.hub",
    "helpers.jobs",
    "helpers.ray_nodes",
    "helpers.refusals",
    "helpers.spoiling",
    "helpers.threads",
]
