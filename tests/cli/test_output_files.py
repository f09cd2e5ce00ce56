"""Where commands write."""

import pytest

from bas.cli.entry import COMMANDS, build_parser, main
from bas.cli.flags import OUTPUTS

REST = {  # what else a line needs
    "attend": ["--prompt", "a"],
    "coco": ["annotations.json", "--images", "."],
    "edit": ["--init_image", "img.png"],
    "evaluate": ["scene"],
    "export": ["mini"],
    "masks": ["scene"],
    "merge": ["run"],
    "paint": ["img.png"],
    "sample": ["--prompt", "a"],
    "study": ["evaluation"],
    "train": ["scene"],
}


def outputs(command):
    """What a command writes to: by name, whether it is a folder or a file."""
    sub = build_parser(command)._subparsers._group_actions[0].choices[command]
    found = [action for action in sub._actions if action.dest in OUTPUTS]
    return {(*action.option_strings, action.metavar)[0]: OUTPUTS[action.dest] for action in found}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_output_is_refused_by_every_command(command, tmp_path, monkeypatch, capsys):
    """As of a shell variable that is not set."""
    monkeypatch.chdir(tmp_path)
    for name, kind in outputs(command).items():
        flag = [name] if name.startswith("--") else []
        assert main([command, *REST.get(command, []), *flag, ""]) == 2
        line = f"bas {command}: {name} is empty: name a {kind} (bas {command} --help lists the flags)\n"
        assert capsys.readouterr().err == line
    assert list(tmp_path.iterdir()) == []


def test_every_output_is_known():
    folders = ["demo", "paint", "train", "vary", "explore", "attend", "coco", "study", "evaluate", "merge"]
    assert {command: found for command in COMMANDS if (found := outputs(command))} == {
        **{command: {"--output_dir": "folder"} for command in folders},
        "masks": {"--output_path": "file", "--output_dir": "folder"},
        "sample": {"--output_path": "file"},
        "edit": {"--output_path": "file"},
        "export": {"FILE": "file"},
        "studio": {"HOME": "folder"},
    }
