"""The `bas` command: finds the sub-command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 the run failed: a number is not finite, memory or disk ran out; 2 the input cannot be used; one
line says why. 128 + n stopped by signal n: 130 Ctrl+C, 143 SIGTERM, 129 the terminal is gone, 141 nobody reads on.
"""

import importlib
import logging
import os
import sys
from contextlib import suppress

from bas import __version__
from bas.cli.flags import Parser
from bas.errors import InputError, RunError, did_you_mean
from bas.runtime.signals import Interrupted

UNREAD = 141  # 128 + SIGPIPE
MEMORY_ADVICE = "try --batch_size 1, --precision fp16, or a smaller --height and --width"
ABOUT = "Extract several concepts from one photograph, and re-imagine them (Break-A-Scene, in plain PyTorch)."

# Each is a module of bas.cli.commands; its help stands here so that `bas --help` imports none of them.
COMMANDS = {
    "demo": "the whole method on the shipped miniature, into one picture",
    "masks": "check a scene's masks, or let a model propose them",
    "paint": "paint masks in the browser",
    "train": "learn the concepts of a scene, or of many",
    "sample": "generate pictures from prompts",
    "vary": "draw all concepts of a run again and again",
    "explore": "draw every combination of a run's concepts in many contexts",
    "attend": "draw a picture and show where each handle looked",
    "edit": "edit places of a photograph with learnt concepts",
    "coco": "build the paper's data set from COCO",
    "study": "make the pages of a user study, or analyse its answers",
    "evaluate": "repeat the paper's comparison of methods on scenes of yours",
    "report": "write the page of a run anew",
    "info": "tell what a file or a folder is, or what this machine has",
    "download": "fetch a Stable Diffusion checkpoint",
    "export": "write a model as one .safetensors file for other tools",
}


def build_parser(chosen: str | None) -> Parser:
    """The command line, with the flags of the chosen command, if it is one; the others are only listed."""
    parser = Parser(prog="bas", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"bas {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=help)
            continue
        module = importlib.import_module(f"bas.cli.commands.{name}")
        epilog = "\n  ".join(("examples:", *module.EXAMPLES))
        sub = commands.add_parser(name, help=help, description=module.__doc__, epilog=epilog)
        sub.add_argument("--debug", action="store_true", help="show the whole trace of an error")
        module.configure(sub)
        sub.set_defaults(run_command=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command, and see what it printed off; returns the exit code."""
    code = attempt(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()  # here, not when Python ends: there it would answer with a trace and a code of its own
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left to print has no reader
            if stream is sys.stdout and not code:
                code = UNREAD if isinstance(error, BrokenPipeError) else 1
                if code == 1:
                    tell(f"standard output cannot be written: {error.strerror}")
    return code


def attempt(argv: list[str]) -> int:
    """Run one command; what goes wrong is told in one line. Returns the exit code."""
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(command)
    if command and command not in COMMANDS:
        parser.error(f"unknown command {command}{did_you_mean(command, COMMANDS)}")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="bas: %(message)s", stream=sys.stderr)
    for noisy in ("transformers", "huggingface_hub", "PIL", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # These two set their level once more when they are imported, which is later.
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["HF_HUB_VERBOSITY"] = "error"
    try:
        args.run_command(args)
    except (InputError, RunError) as error:
        if args.debug:
            raise
        tell(error)
        return 2 if isinstance(error, InputError) else 1
    except Interrupted as stop:
        tell(stop)
        return stop.exit_code
    except KeyboardInterrupt:
        tell("interrupted", before="\n")  # the terminal shows ^C in the same line
        return 130
    except BrokenPipeError:
        return UNREAD
    except OSError as error:  # most often of a file that is written: readers name what is wrong with theirs
        if args.debug:
            raise
        reason = error.strerror or error
        tell(f"{error.filename}: {reason}" if error.filename else reason)
        return 1
    except (RuntimeError, MemoryError) as error:
        from bas.runtime.device import is_out_of_memory  # imports PyTorch

        if args.debug or not is_out_of_memory(error):
            raise
        tell(f"out of memory: {MEMORY_ADVICE}")
        return 1
    return 0


def tell(message: object, before: str = "") -> None:
    """One line on standard error; none where nobody can read it."""
    with suppress(OSError):
        print(f"{before}bas: {message}", file=sys.stderr)
