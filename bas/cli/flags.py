"""Command-line flags made from dataclass fields, and a parser whose errors are one line."""

import argparse
import re
from collections.abc import Collection
from dataclasses import Field, fields
from functools import partial
from typing import Any, NoReturn

from bas.config import GROUPS, chosen, value_type
from bas.errors import InputError, did_you_mean, printable

OUTPUTS = {"output_dir": "folder", "output_path": "file", "home": "folder"}  # what a command writes to


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with a known flag that an unknown one may mean."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=HelpFormatter)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse as argparse does, but raise the error for an unknown flag here, where the flags are known.

        An empty output, as of a shell variable that is not set, is an error in every command.
        """
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unknown argument {rest[0]}{did_you_mean(rest[0], self._option_string_actions)}")
        for action in self._actions:
            if action.dest in OUTPUTS and getattr(namespace, action.dest, None) == "":
                name = action.option_strings[0] if action.option_strings else action.metavar
                self.error(f"{name} is empty: name a {OUTPUTS[action.dest]}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)  # a wrong value, as `read_value` words it
        self.exit(2, f"{self.prog}: {printable(message)} ({self.prog} --help lists the flags)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Help with a short usage line and one column of flags; indented lines, the examples, are not wrapped."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        needed = [action for action in actions if action.required or not action.option_strings]
        line = super()._format_usage(usage, needed, [], prefix).rstrip("\n")
        return f"{line}{' [FLAGS]' if len(needed) < len([*actions]) else ''}\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(line if line[:1] == " " else fill(line, width, indent) for line in text.splitlines())


METAVARS = {str: "TEXT", int: "INT", float: "FLOAT"}


def add_fields(parser: argparse.ArgumentParser, settings: type, only: Collection[str] | None = None) -> None:
    """Declare one flag per dataclass field, in the groups that the fields name; or per one in `only`, without groups.

    A flag that is not given leaves no value, so that presets can fill it. Every switch has both its flags: a value of
    a file, a preset or a model is changed either way.
    """
    chosen = [f for f in fields(settings) if only is None or f.name in only]
    titles = ["" if only else GROUPS[0] if f.metadata["common"] else f.metadata["group"] or "" for f in chosen]
    places = {title: parser.add_argument_group(title) for title in GROUPS if title in titles}
    for f, title in zip(chosen, titles, strict=True):
        for names, options in arguments(f):
            places.get(title, parser).add_argument(*names, dest=f.name, default=argparse.SUPPRESS, **options)


def arguments(f: Field) -> list[tuple[list[str], dict[str, Any]]]:
    """Return the flags of one setting, each with its names and the options of `add_argument`."""
    names, text = [f"--{f.name}", *f.metadata["flag"]], f.metadata["help"].replace("%", "%%")
    if f.type is bool:
        off = [*f.metadata["flag"]] or [f"--no_{f.name}"]
        on_help, off_help = (argparse.SUPPRESS, f"turn off: {text}") if f.default else (text, argparse.SUPPRESS)
        return [
            ([f"--{f.name}"], {"action": "store_true", "help": on_help}),
            (off, {"action": "store_false", "help": off_help}),
        ]
    kind, several, _ = value_type(f)
    shown: Any = f.default
    shown = " ".join(shown) if several else shown
    if shown not in (None, "") and "default:" not in text:
        text += f" (default: {shown})"
    choices = f.metadata["choices"] or None
    options: dict[str, Any] = {"type": partial(read_value, f, kind), "help": text}
    options |= {"metavar": None if choices else "DIR" if f.name.endswith("_dir") else METAVARS[kind]}
    options |= {"nargs": "+"} if several else {"choices": choices}
    if "bare" in f.metadata:
        options |= {"nargs": "?", "const": f.metadata["bare"]}
    return [(names, options)]


def read_value(f: Field, kind: type, text: str) -> Any:
    """Read one value of a flag; ranges are checked with all settings. ArgumentTypeError for another kind of value."""
    try:
        return chosen(f, "", text) if f.metadata["choices"] else kind(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r:.60}: expected a {'whole ' * (kind is int)}number") from None


def given(args: argparse.Namespace, settings: type) -> dict:
    """Return the settings that were given as flags."""
    names = {f.name for f in fields(settings)}
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Declare the two flags of every command that runs a model."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "fp16", "bf16"),
        type=lambda text: "fp32" if text == "no" else text,  # as --mixed_precision calls it
        help="arithmetic; no is fp32 too (default: %(default)s)",
    )


def add_config(parser: Parser) -> None:
    """Declare --config."""
    parser.add_argument("--config", metavar="FILE", help="settings from a .toml file; flags override it")


PATHS = ("FILE", "DIR", "SCENE", "RUN", "MODEL", "PATH", "IMAGE", "ANNOTATIONS", "EVALUATION")
COMPLETION = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # shtab.FILE


def complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let the shell complete file names for every argument that takes one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                complete_paths(sub)
        elif action.metavar in PATHS or action.dest.endswith(("_dir", "_path")):
            action.complete = COMPLETION  # type: ignore[attr-defined]
