"""Command-line flags made from dataclass fields, and a parser whose errors are one line."""

import argparse
import typing
from collections.abc import Collection
from dataclasses import fields

from bas.errors import did_you_mean
from bas.io.settings_file import value_type


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest flag for an unknown one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=HelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but a flag that this command doesn't have is an error here, where its flags are known."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unknown argument {rest[0]}{did_you_mean(rest[0], self._option_string_actions)}")
        return namespace, rest

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the flags)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Help with one column of flags, wide enough for long names; indented lines, the examples, stay whole."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            line if line[:1] == " " else super(HelpFormatter, self)._fill_text(line, width, indent) for line in lines
        )


def add_fields(parser: argparse.ArgumentParser, settings: type, only: Collection[str] | None = None) -> None:
    """One flag per dataclass field, or per one in `only`. Flags not given stay out, so that presets can fill them.

    What a model's own settings, a preset or a file switch on, `--no_` before the name switches off.
    """
    for f in fields(settings):
        if only is not None and f.name not in only:
            continue
        names = [f"--{f.name}", *f.metadata.get("flag", ())]
        help = f.metadata["help"].replace("%", "%%")
        common = {"dest": f.name, "default": argparse.SUPPRESS}
        if f.type is bool and f.default:
            parser.add_argument(*f.metadata["flag"], action="store_false", help=help, **common)
        elif f.type is bool:
            parser.add_argument(*names, action="store_true", help=help, **common)
            parser.add_argument(f"--no_{f.name}", action="store_false", help=argparse.SUPPRESS, **common)
        else:
            kind, many = value_type(f.type)
            shown = " ".join(f.default) if many else f.default
            if shown not in (None, "") and "default:" not in help:
                help += f" (default: {shown})"
            extra = {"nargs": "+"} if many else {"choices": f.metadata.get("choices")}
            if "bare" in f.metadata:
                extra |= {"nargs": "?", "const": f.metadata["bare"]}
            metavar = None if f.metadata.get("choices") else kind.__name__.upper()
            parser.add_argument(*names, type=kind, metavar=metavar, help=help, **extra, **common)


def given(args: argparse.Namespace, settings: type) -> dict:
    """The settings' fields that were given as flags."""
    names = {f.name for f in fields(settings)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items() if name in names}


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The two flags of every command that runs a model."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    precisions = ("auto", "fp32", "fp16", "bf16")
    parser.add_argument("--precision", default="auto", choices=precisions, help="arithmetic (default: %(default)s)")


def add_config(parser: Parser) -> None:
    """Declare --config."""
    parser.add_argument("--config", metavar="FILE", help="settings from a .toml file; flags win over it")
