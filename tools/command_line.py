"""How the tools of this folder end when their input is wrong: as bas does, with one line and exit code 2."""

import sys
from collections.abc import Callable

from bas.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Call the `main` of the module that Python was started with."""
    try:
        main()
    except InputError as error:
        spec = sys.modules["__main__"].__spec__
        name = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
        print(f"python -m {name}: {error}", file=sys.stderr)
        sys.exit(2)
