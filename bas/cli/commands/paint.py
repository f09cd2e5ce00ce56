"""Paint masks in the browser: one colour per concept, saved as a scene to train on."""

import argparse
import contextlib
from pathlib import Path

from bas.cli.flags import Parser
from bas.data.scene_writer import open_draft
from bas.web.painter import Server, next_steps

EXAMPLES = (
    "bas paint photo.jpg",
    "bas paint my_scene",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("source", metavar="IMAGE", help="an image, or a scene folder whose masks to change")
    parser.add_argument(
        "--output_dir",
        help="scene folder to write (default: beside the image and named after it; of img.* its own folder)",
    )
    parser.add_argument("--port", type=int, default=0, help="port on this machine (default: any free one)")


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl+C."""
    draft = open_draft(Path(args.source), Path(args.output_dir) if args.output_dir else None)
    with Server(draft, args.port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"Open {server.url} in a browser on this machine; saving writes {draft.folder}. Ctrl+C ends.", flush=True)
        print("`bas studio` does every step on one page: paint, train, draw and edit.", flush=True)
        server.serve_forever()
    if server.session.saved:
        print(f"\n{next_steps(draft)}")
