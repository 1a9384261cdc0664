# SPDX-License-Identifier: Apache-2.0
"""The exceptions of this package."""


class PeftError(Exception):
    """Base of the package's own exceptions."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """No module or parameter of the model matched the configuration."""


class AdapterFileError(PeftError, ValueError):
    """A weights file that cannot be read: truncated, of another format, or with things other than tensors in it."""
