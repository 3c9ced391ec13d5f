"""Marks of tests, for parameters that have some of their own."""

import pytest

BESIDE = (pytest.mark.slow, pytest.mark.beside)
"""Slow, and bears others beside it."""

VARIANT = (pytest.mark.slow, pytest.mark.variant)
"""Slow, and the failure of another test in another mode or at another point."""
