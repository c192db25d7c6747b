"""``python -m bllkern``: as the command ``bllkern``; without arguments, ``bllkern info``."""

import sys

from .cli import main

sys.exit(main())
