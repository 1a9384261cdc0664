# SPDX-License-Identifier: Apache-2.0
"""Version: the API level we answer for, and our own version as PEP 440 local label."""

__inlay_version__ = "0.1.0"
__version__ = f"0.21.2+inlay.{__inlay_version__}"
