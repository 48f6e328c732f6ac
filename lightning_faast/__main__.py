"""Run the command line: ``python -m lightning_faast``."""

import sys

from lightning_faast.cli import main

sys.exit(main())
