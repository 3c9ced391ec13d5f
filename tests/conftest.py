"""Fixtures that all tests may ask for lie in these modules; files with slow tests come first."""

import pytest

pytest.register_assert_rewrite("helpers")

pytest_plugins = [
    "helpers.models",
    "helpers.jobs",
    "helpers.ray_nodes",
    "helpers.refusals",
    "helpers.spoiling",
    "helpers.threads",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, whole clusters before all others, so that no worker is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "system"))
