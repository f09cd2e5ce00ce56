"""Do every step in the browser: add a photograph, paint masks, train, draw, edit and export."""

import argparse
import getpass
import importlib.util
import logging
import os
import sys
from pathlib import Path

from bas.cli.flags import Parser
from bas.errors import InputError
from bas.io.json_files import read_text

log = logging.getLogger(__name__)

EXAMPLES = (
    "bas studio",
    "bas studio my_studio --port 8765 --no_browser",
)
PASSWORD = "BAS_STUDIO_PASSWORD"
NEEDED = ("starlette", "uvicorn")


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "home",
        metavar="HOME",
        nargs="?",
        default="studio",
        help="folder of the scenes and runs; it is made if it is missing (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, help="port on this machine (default: 8765, or any free one)")
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="also answer at this address of this machine, after a password; only for a network that you trust",
    )
    parser.add_argument(
        "--password_file",
        metavar="FILE",
        help=f"file whose first line is the password of --listen (default: ${PASSWORD}, or the terminal asks for it)",
    )
    parser.add_argument(
        "--segmenter",
        metavar="MODEL",
        action="append",
        default=[],
        help="model that proposes masks, SAM or CLIPSeg: a folder or a hub id; give the flag once for each (default: "
        "those of bas masks)",
    )
    parser.add_argument("--no_browser", action="store_true", help="print the address without opening a browser")
    parser.add_argument("--job", metavar="DIR", help=argparse.SUPPRESS)  # how the studio starts its own processes


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl+C; or run one job of it."""
    set_password = os.environ.pop(PASSWORD, None)  # in any case: the studio's own processes do not inherit it
    if args.job:
        from bas.cli.entry import attempt
        from bas.web.studio.jobs import SPARE
        from bas.web.studio.worker import wait_for_job, work

        folder = wait_for_job() if args.job == SPARE else Path(args.job)
        sys.exit(work(folder, attempt) if folder else 0)
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        how = "pip install -c constraints.txt -e '.[studio]' in bas's folder, or pip install starlette uvicorn"
        raise InputError(f"the studio needs two small packages: {how}")
    from bas.web.studio.serve import run_until_interrupted
    from bas.web.studio.store import Home

    if not args.listen and args.password_file is not None:
        raise InputError("--password_file needs --listen ADDRESS: this machine alone is asked for no password")
    if not args.listen and set_password is not None:
        log.warning("%s has no effect: only with --listen a password is asked for", PASSWORD)
    home = Home(Path(args.home), read_segmenters(args.segmenter))
    listen = (args.listen, read_password(args.password_file, set_password)) if args.listen else None
    run_until_interrupted(home, args.port, not args.no_browser, listen)


def read_segmenters(names: list[str]) -> dict[str, str]:
    """Return the folders of `--segmenter` by method. PyTorch is loaded only if there are some: that takes seconds."""
    if not names:
        return {}
    from bas.web.studio.proposals import by_method

    return by_method(names)


def read_password(file: str | None, set_password: str | None) -> str:
    """Read the password of --listen from a file or the terminal: others can see command lines.

    set_password: that of the environment, which holds without a file. InputError if there is no password.
    """
    if file is not None:
        return (read_text(Path(file)).splitlines() or [""])[0]
    if set_password is not None:
        return set_password
    if not sys.stdin.isatty():
        raise InputError(f"--listen needs a password: name a --password_file, or set {PASSWORD}")
    return getpass.getpass("Password for those who open the studio: ")
