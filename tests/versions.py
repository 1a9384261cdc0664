"""Tests of what only newer releases of a library have; the suite also runs on the oldest that are allowed."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def since(package: str, release: str, reason: str = "") -> pytest.MarkDecorator:
    """Skip the test on older releases of `package`."""
    return pytest.mark.skipif(Version(version(package)) < Version(release), reason=f"{package} {release}: {reason}")
