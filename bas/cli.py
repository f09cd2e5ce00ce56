"""The `bas` command: finds the sub-command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 the run failed: a number is not finite, memory or disk ran out; 2 the input cannot be used; one
line says why. 128 + n stopped by signal n: 130 Ctrl+C, 143 SIGTERM, 129 the terminal is gone, 141 nobody reads on.
"""

import importlib
import logging
import os
import sys

from bas import __version__
from bas.config import InputError, RunError
from bas.flags import Parser
from bas.interrupts import Interrupted

ABOUT = "Extract several concepts from one photograph, and re-imagine them (Break-A-Scene, in plain PyTorch)."

# Each is a module of bas.commands; its help stands here so that `bas --help` imports none of them.
COMMANDS = {
    "demo": "the whole method on the shipped miniature, into one picture",
    "masks": "check a scene's masks, or let a model propose them",
    "paint": "paint masks in the browser",
    "train": "learn the concepts of one scene",
    "sample": "generate pictures from prompts",
    "vary": "draw all concepts of a run again and again",
    "explore": "draw every combination of a run's concepts in many contexts",
    "attend": "draw a picture and show where each handle looked",
    "edit": "edit places of a photograph with learnt concepts",
    "coco": "build the paper's data set from COCO",
    "study": "make the pages of a user study, or analyse its answers",
    "report": "write the page of a run anew",
    "info": "tell what a file or a folder is, or what this machine has",
    "download": "fetch a Stable Diffusion checkpoint",
    "export": "write a model as one .safetensors file for other tools",
}


def build_parser(chosen: str | None) -> Parser:
    """The command line, with the flags of the chosen command; the others are only listed."""
    parser = Parser(prog="bas", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"bas {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, gloss in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=gloss)
            continue
        module = importlib.import_module(f"bas.commands.{name}")
        sub = commands.add_parser(name, help=gloss, description=module.__doc__)
        sub.add_argument("--debug", action="store_true", help="show the whole trace of an error")
        module.configure(sub)
        sub.set_defaults(run_command=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(next((word for word in argv if word in COMMANDS), None)).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="bas: %(message)s", stream=sys.stderr)
    for noisy in ("transformers", "huggingface_hub", "PIL", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        args.run_command(args)
    except (InputError, RunError) as error:
        if args.debug:
            raise
        print(f"bas: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Interrupted as stop:
        print(f"bas: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\nbas: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print has no reader
        return 141
    except OSError as error:  # of a file that is written: those that are read have been checked
        if args.debug:
            raise
        print(f"bas: {error.filename or 'a file'} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0
