"""`python -m bas` is the `bas` command."""

import sys

from bas.cli.entry import main

sys.exit(main())
