"""Marks of tests, for parameters that have some of their own."""

import pytest

BESIDE = (pytest.mark.slow, pytest.mark.beside)
"""Slow, and bears others beside it."""
