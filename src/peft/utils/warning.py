# SPDX-License-Identifier: Apache-2.0
"""The warning category of this package."""


class PeftWarning(UserWarning):
    """A warning about the use of adapters."""
