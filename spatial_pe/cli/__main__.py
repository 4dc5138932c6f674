# SPDX-License-Identifier: Apache-2.0
"""python -m spatial_pe.cli: the command line, where its script is not on the PATH."""

import sys

from . import main

sys.exit(main())
