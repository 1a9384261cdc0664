# SPDX-License-Identifier: Apache-2.0
"""`python -m peft.cli`, the form that torchrun and accelerate launch take."""

import sys

from . import main

sys.exit(main())
