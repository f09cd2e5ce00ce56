"""The `bas` command: find the sub-command, run it, and turn errors into one line and an exit code.

Exit codes: 0 done; 1 the run failed: a number is not finite, memory or disk ran out; 2 the input cannot be used.
128 + n stopped by signal n: 130 Ctrl+C, 143 SIGTERM, 129 the terminal is closed, 141 the reader of a pipe has ended.
"""

import errno
import importlib
import logging
import os
import sys

from bas import __version__
from bas.cli.flags import Parser, complete_paths
from bas.cli.streams import UNREAD, print_error, standard_streams
from bas.errors import InputError, RunError, did_you_mean, printable
from bas.io.files import DISK_IS_FULL, reason_of
from bas.runtime.signals import Interrupted

MEMORY_ADVICE = "try --batch_size 1, --precision fp16, or a smaller --height and --width"
ABOUT = "Extract several concepts from a single image, and re-imagine them (Break-A-Scene, in plain PyTorch)."

FIRST_STEPS = """\
Extract several concepts from a single image, and re-imagine them.

Run the whole method on a small model that ships with bas, in minutes on a CPU:
  bas demo

Learn the concepts of your own image, on a GPU:
  bas download sd21-base                  fetch Stable Diffusion 2.1, about 5 GB, once
  bas paint photo.jpg                     paint a mask for each concept in the browser; this writes the scene `photo`
  bas masks photo --weights sd21-base     check the masks as the training will see them
  bas train photo --weights sd21-base --output_dir runs/photo
  bas sample runs/photo --prompt "a photo of <asset0> at the beach"

`bas --help` lists all commands, `bas COMMAND --help` the flags of one.
"""

# Each is a module of bas.cli.commands; its help stands here so that `bas --help` imports none of them.
COMMANDS = {
    "demo": "run the whole method on the miniature; write a figure and a report",
    "masks": "check a scene's masks, or let a model propose them",
    "paint": "paint masks in the browser",
    "studio": "do every step in the browser: masks, training, images, edits",
    "train": "learn the concepts of one scene or of many",
    "sample": "generate images from prompts",
    "vary": "generate all concepts of a run together, with many seeds",
    "explore": "generate every combination of a run's concepts in many contexts",
    "attend": "generate an image and show where each handle looked",
    "edit": "place learnt concepts in an image, inside masks",
    "coco": "build the paper's data set from COCO",
    "study": "make the pages of a user study, or analyse its answers",
    "evaluate": "repeat the paper's comparison of methods on your scenes",
    "report": "write the report of a run again",
    "info": "say what a file or a folder is, or describe this machine",
    "download": "fetch a Stable Diffusion checkpoint",
    "merge": "put the concepts of several small runs into one, or one into its base",
    "export": "write a model, or a small run as a LoRA with embeddings, for other tools",
}


def build_parser(*chosen: str | None) -> Parser:
    """Build the parser, with the flags of the chosen commands; the others are only listed."""
    parser = Parser(prog="bas", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"bas {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        if name not in chosen:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"bas.cli.commands.{name}")
        epilog = "\n  ".join(("examples:", *module.EXAMPLES))
        sub = commands.add_parser(name, help=summary, description=module.__doc__, epilog=epilog)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.configure(sub)
        sub.set_defaults(run_command=module.run)
    return parser


def full_parser() -> Parser:
    """Build the parser with the flags of every command, for shtab: `shtab --shell bash bas.cli.entry.full_parser`."""
    parser = build_parser(*COMMANDS)
    complete_paths(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code. 1 if the work is done and standard output could not be written."""
    with standard_streams() as output:
        try:
            code = attempt(sys.argv[1:] if argv is None else argv)
        except SystemExit as end:  # of the parser, after help or a wrong line; of a process beside the first
            code = int(end.code or 0)
        output.end()
        if output.error and not code:
            code = UNREAD if isinstance(output.error, BrokenPipeError) else 1
            if code == 1:
                print_error(f"standard output cannot be written: {output.error.strerror}")
    return code


def attempt(argv: list[str]) -> int:
    """Run one command and report its errors in one line. Returns the exit code."""
    if not argv:
        print(FIRST_STEPS, end="")
        return 0
    if argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(command)
    if command and command not in COMMANDS:
        parser.error(f"unknown command {command}{did_you_mean(command, COMMANDS)}")
    args = parser.parse_args(argv)
    set_up_logging()
    try:
        args.run_command(args)
    except (InputError, RunError) as error:
        if args.debug:
            raise
        print_error(error)
        return 2 if isinstance(error, InputError) else 1
    except Interrupted as stop:
        print_error(stop)
        return stop.exit_code
    except KeyboardInterrupt:
        print_error("interrupted", before="\n")  # the terminal shows ^C in the same line
        return 130
    except BrokenPipeError:
        return UNREAD
    except OSError as error:  # of a file that is written: readers raise InputError
        if args.debug:
            raise
        too_long = error.errno == errno.ENAMETOOLONG  # then no such file is there, read or written
        advice = ": make room" if error.errno in DISK_IS_FULL else ": name a shorter path" if too_long else ""
        reason = f"{reason_of(error)}{advice}"
        print_error(f"{error.filename}: {reason}" if error.filename else reason)
        return 2 if too_long else 1
    except (RuntimeError, MemoryError) as error:
        from bas.runtime.device import is_out_of_memory  # imports PyTorch

        if args.debug or not is_out_of_memory(error):
            raise
        print_error(f"out of memory: {MEMORY_ADVICE}")
        return 1
    return 0


class OneLine(logging.Formatter):
    """A log format whose message is one printable line, whatever a file's name or content puts into it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message behind the name of the program."""
        return f"bas: {printable(record.message)}"


class Once(logging.Filter):
    """Pass each warning once, though a request is checked before the work and again in each batch of it.

    So pass other records that say `once`: a model is described before it is loaded.
    """

    def __init__(self):
        super().__init__()
        self.passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record says something new."""
        message, known = record.getMessage(), len(self.passed)
        if record.levelno != logging.WARNING and not getattr(record, "once", False):
            return True
        self.passed.add(message)
        return len(self.passed) > known


def set_up_logging() -> None:
    """Log to standard error; of the libraries, errors alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    handler.addFilter(Once())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("transformers", "huggingface_hub", "httpx", "httpx2", "PIL", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # These two set their level once more when they are imported, which is later.
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["HF_HUB_VERBOSITY"] = "error"
