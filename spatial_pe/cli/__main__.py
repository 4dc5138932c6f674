# SPDX-License-Identifier: Apache-2.0
"""Run the command line by python -m spatial_pe.cli, if its script is not on the PATH."""

import sys

from . import main

sys.exit(main())
