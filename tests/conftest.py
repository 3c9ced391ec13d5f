"""Fixtures that all tests may ask for lie in these modules."""

import pytest

pytest.register_assert_rewrite("helpers")

pytest_plugins = [
    "helpers.models",
    "helpers.engines",
    "helpers.jobs",
    "helpers.ray_nodes",
    "helpers.refusals",
    "helpers.spoiling",
    "helpers.threads",
]
