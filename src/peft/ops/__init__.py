# SPDX-License-Identifier: Apache-2.0
"""Pure functions on tensors: every method's arithmetic, each with a plain reference and an efficient path."""

from .dispatch import is_plain, plain, use_plain

__all__ = ["is_plain", "plain", "use_plain"]
