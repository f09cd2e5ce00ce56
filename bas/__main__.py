"""`python -m bas` is the `bas` command."""

import sys

from bas.cli import main

sys.exit(main())
