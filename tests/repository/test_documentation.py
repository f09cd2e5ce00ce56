"""Every command that the documentation and the commands' help show: it parses, and it runs on the shipped model.

Commands are read out of README.md, docs/*.md, weights/*.md and `bas COMMAND --help`, so a new one is tested too. Three
things differ from what is written, and nothing else: FEWER flags make it short; a model that has to be downloaded is
the shipped one instead; and words in capitals, such as RUN, are the files of a desk laid out for each command.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bas.cli.commands import evaluate, sample
from bas.cli.entry import COMMANDS, build_parser, main
from bas.config import SampleConfig, TrainConfig, setting_rows
from bas.pretrained import hub

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "weights").rglob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "tests").rglob("*.md"))]
MINI = hub.find(None)

INSTALL = "pip install -c constraints.txt -e"
CPU_BUILD = "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
NOT_BAS = {"python3 -m venv .venv", ". .venv/bin/activate", f"{INSTALL} .", CPU_BUILD, f"{INSTALL} '.[test]'", "pytest"}
MENTIONED = {  # in a sentence: no whole command
    "train --background_handle",
    "train --deterministic",
    "train --dry_run",
    "train SCENE SCENE …",
    "train --help",
    "COMMAND --help",
    "coco ANNOTATIONS",
    "study EVALUATION",
    "edit RUN",
    "merge RUN --into_base --output_dir DIR",
}
STANDS_FOR = {
    "PATH": "RUN",
    "IMAGE": "photo.jpg",
    "NAME": "sd15",
    "METHOD": "sam",
    "FILE": "model.safetensors",
    "TEXT": "a photo of <asset0>",
}
DOWNLOADED = {"sd21-base": "mini"}  # after --weights
SAMPLING = "--num_inference_steps 2 --device cpu"
STEPS = "--phase1_train_steps 1 --phase2_train_steps 1 --num_class_images 1"
FEWER = {
    "train": f"{STEPS} --img_log_steps 0 --device cpu",
    "evaluate": f"{STEPS} {SAMPLING} --methods bas ti-m --seeds 0 --first_scenes 1 --prompts 1",
    **dict.fromkeys(("sample", "vary", "explore", "attend", "edit"), SAMPLING),
    "demo": "--device cpu",
}
REFUSED = {  # what cannot run on what ships, by a part of the command as it is run, and what it is told
    "--auto": "hf download facebook/sam-vit-base",  # the segmentation model is in nobody's cache here
    "export MODEL": "a single file carries no tokenizer",  # the miniature has a vocabulary of its own
    "export my_model": "a single file carries no tokenizer",
    "sample model.safetensors": "model.safetensors does not exist",  # so there is no such file of it
    "style.safetensors:0.8": "style.safetensors",  # a file that nobody has
}
OF_SMALL_RUNS = {"merge", "--rank"}  # commands and flags that take runs which keep only their trained weights
SMALL_RUNS = {"OTHER_RUN", "runs/toys", "runs/mugs"}
NOT_SHIPPED = {"coco", "study", "coco_scenes/000000123456"}  # need COCO, an evaluation's images: one line says so
AT_ONCE = ("coco", "study", "info", "masks", "paint", "studio", "download", "export")  # generate nothing


# --- Reading ------------------------------------------------------------------------------------------------------


def blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a page, of one language or of all."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language or not language]


def shell_lines(page: Path) -> list[str]:
    """The commands of a page's code blocks, those joined by && one by one, without prompts and comments."""
    lines = [line.strip().removeprefix("$ ") for block in blocks(page) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [re.sub(r"\s+# .*", "", part) for part in parts]


def documented() -> list[str]:
    """Every command of bas on the pages, in code blocks and in sentences."""
    found = []
    for page in PAGES:
        found += [line for line in shell_lines(page) if line.startswith("bas ")]
        inline = re.findall(r"`bas (\w+ [^`]+)`", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL))
        found += [f"bas {words}" for words in inline if words not in MENTIONED]
    return found


def examples(command: str) -> list[str]:
    """The last lines of a command's help."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main([command, "--help"])
    return [line.strip() for line in output.getvalue().partition("examples:\n")[2].splitlines()]


ALL = list(dict.fromkeys([*documented(), *(line for command in COMMANDS for line in examples(command))]))


def words_of(line: str) -> list[str]:
    """A written command as it is run here, without its `bas`."""
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line)[1:]]
    return [DOWNLOADED.get(word, word) if before == "--weights" else word for before, word in pairwise(["", *words])]


# --- What is written ----------------------------------------------------------------------------------------------


def test_commands_were_found():
    """The pages and the help, code blocks and sentences: one that must be found of each."""
    assert 'bas sample runs/photo --prompt "a photo of <asset0> at the beach" --output_path beach.png' in ALL
    assert {"bas demo", "bas report RUN", "bas paint photo", "bas info", "bas download sd21-base"} <= set(ALL)
    assert "bas masks creature --weights sd21-base --initializer_tokens creature bowl stone" in " ".join(ALL)
    assert {shlex.split(line)[1] for line in ALL} == set(COMMANDS)


def test_help_ends_with_examples_of_its_own_command():
    found = {command: examples(command) for command in COMMANDS}
    assert all(found.values())
    wrong = [line for command, lines in found.items() for line in lines if shlex.split(line)[:2] != ["bas", command]]
    assert wrong == []


def test_every_command_parses():
    """A wrong flag ends the parser, which prints the line of the mistake."""
    for line in ALL:
        words = words_of(line)
        assert build_parser(words[0]).parse_args(words).command == words[0]


def test_other_programs_of_the_readme_are_known():
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in re.split(r"\n| && ", block.strip())]
    assert {line for line in lines if not line.startswith("bas ")} == NOT_BAS


def test_the_cpu_build_is_that_of_the_constraints():
    assert CPU_BUILD.split()[2] in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_ci_runs_the_commands_of_the_readme():
    """The workflow calls .ci/run, which also tests pages and the official run; the pre-commit hooks call its checks."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in script
    more = ["pytest -m browser", "pytest -m slow tests/scenarios/test_oracle.py"]
    assert script[-6:] == ["ruff check .", "ruff format --check .", "pyright bas", "pytest", *more]
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"entry: (\w+)", hooks) == ["ruff", "ruff", "pyright"]


def test_tools_that_are_named_are_there():
    texts = "\n".join(page.read_text(encoding="utf-8") for page in LINKING)
    named = set(re.findall(r"python -m (tools(?:\.[a-z_]+)*)", texts))
    assert len(named) >= 3
    assert all(find_spec(name) for name in named)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings():
    broken, inside = [], 0
    for page in LINKING:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if "://" not in link:
                inside += 1
                if not target.exists() or (anchor and anchor not in anchors(target)):
                    broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
    assert inside > 60


def test_pages_of_the_site_link_to_pages_of_the_site():
    """docs/ is built into a site of its own: nothing outside of it is there."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    assert not [page.name for page in pages if "](../" in page.read_text(encoding="utf-8").replace("](../index", "")]


def test_every_room_is_described():
    """CONTRIBUTING has a row for each file of bas, and for each room with its first sentence; the site shows each."""
    rooms = {path.parent.name for path in (ROOT / "bas").glob("*/__init__.py")}
    files = {path.name for path in (ROOT / "bas").glob("*.py") if not path.name.startswith("__")}
    rows = re.findall(r"^\| `bas/([\w.]+?)/?` \| (.*) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(rooms | files)
    for name, text in rows:
        if name in rooms:
            sentence = import_module(f"bas.{name}").__doc__.splitlines()[0].rstrip(".")
            assert text == sentence[0].lower() + sentence[1:]
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: bas\.(\w+)$", pages, re.MULTILINE))
    assert {name.removesuffix(".py") for name in rooms | files} <= shown


# --- Running ------------------------------------------------------------------------------------------------------


def hard_links(source: Path, target: Path) -> None:
    """A copy of a folder that takes no room; files that are replaced stay as they are in the other."""
    shutil.copytree(source, target, copy_function=os.link)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on the shipped model with the handles that the pages name, one step a phase."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = f"--background_handle bg --output_dir {folder} {FEWER['train']}"
    assert main(["train", str(MINI / "scenes" / "playroom"), *flags.split()]) == 0
    return folder


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """The current folder, with scenes, images and masks under the names that the pages use, and no network."""
    for name in ("SCENE", "my_scene", "creature", "photo", "one", "two", "three"):
        shutil.copytree(MINI / "scenes" / "playroom", tmp_path / name)
    for name in ("SCENES", "scenes", "my_scenes"):
        shutil.copytree(MINI / "scenes", tmp_path / name)
    hard_links(MINI, tmp_path / "my_model")
    (tmp_path / "MODEL").symlink_to("my_model")
    with Image.open(MINI / "scenes" / "shore" / "img.png") as image:
        image.convert("RGB").resize((512, 448)).save(tmp_path / "photo.jpg")
    left = np.zeros((448, 512), np.uint8)
    left[60:300, 20:240] = 255
    for name, mask in (("where", left), ("left", left), ("right", left[:, ::-1])):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    (regions,) = (block for block in blocks(ROOT / "docs" / "applications.md", "json") if '"mask"' in block)
    (tmp_path / "edits.json").write_text(regions)
    (layout,) = blocks(ROOT / "docs" / "sampling.md", "json")
    (tmp_path / "layout.json").write_text(layout)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_options: str(MINI))

    def leave(_server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bas.web.painter.Server.serve_forever", leave)
    monkeypatch.setattr("uvicorn.Server.run", lambda _server, sockets: None)
    monkeypatch.setattr("webbrowser.open", lambda _address: True)
    short = {"phase1_train_steps": 1, "phase2_train_steps": 1, "num_class_images": 1}  # the demo's flags are few
    monkeypatch.setattr(import_module("bas.cli.commands.demo"), "SHORTER", short)
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small run on the shipped model, one step a phase."""
    folder = tmp_path_factory.mktemp("small") / "run"
    flags = f"--train lora --output_dir {folder} {FEWER['train']}"
    assert main(["train", str(MINI / "scenes" / "playroom"), *flags.split()]) == 0
    return folder


def put_run(desk: Path, run: Path, *names: str) -> None:
    """Lay the run onto the desk, under two names that the pages use, and others."""
    for name in ("RUN", "runs/creature", *names):
        (desk / name).parent.mkdir(exist_ok=True)
        hard_links(run, desk / name)


def outputs(words: list[str]) -> list[Path]:
    """The files and folders that a command is told to write."""
    return [Path(words[i + 1]) for i, word in enumerate(words) if word in ("--output_path", "--output_dir")]


def run(desk: Path, line: str, capsys) -> None:
    """Run a written command, shortened: it ends with 0, says something, and what it was told to write is there.

    One that is REFUSED, or whose data is NOT_SHIPPED, ends with 2 and says why.
    """
    words = words_of(line)
    for path in outputs(words):
        shutil.rmtree(path, ignore_errors=True)  # a run is written into a new folder
    if "photo.jpg" in words:
        shutil.rmtree(desk / "photo")  # the scene that is made of the image
    capsys.readouterr()
    code = main([*words, *FEWER.get(words[0], "").split()])
    told = capsys.readouterr()
    if reasons := [reason for part, reason in REFUSED.items() if part in " ".join(words)]:
        assert code == 2
        assert reasons[0] in told.err
        return
    if NOT_SHIPPED & set(words):
        assert code == 2
        assert [line.startswith("bas: ") for line in told.err.splitlines()] == [True]
        return
    assert code == 0, told.err
    assert told.out
    if "--dry_run" not in words:
        assert all(path.exists() for path in outputs(words))


WITHOUT_RUN = [
    line
    for line in ALL
    if words_of(line)[0] in AT_ONCE and not {"RUN", "runs/creature", "runs/small"} & {*words_of(line)}
]


@pytest.mark.parametrize("line", WITHOUT_RUN)
def test_a_command_that_draws_nothing_runs(line, desk, capsys):
    run(desk, line, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in ALL if line not in WITHOUT_RUN])
def test_a_command_runs_on_the_shipped_model(line, desk, trained, small, capsys):
    words = {*words_of(line)}
    put_run(desk, small if words & OF_SMALL_RUNS else trained, *({"runs/photo"} & words))
    for name in {"runs/small", *(SMALL_RUNS & words)}:
        hard_links(small, desk / name)
    run(desk, line, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_python_that_samples_runs(page, desk, trained):
    put_run(desk, trained, "runs/photo")
    (code,) = blocks(ROOT / page, "python")
    names: dict = {}
    exec(code, names)
    assert [image.size for image in names["images"]] == [(64, 64)] * 2


@pytest.mark.slow
def test_python_that_trains_runs(desk):
    (code,) = blocks(ROOT / "docs" / "training.md", "python")
    short = "phase1_train_steps=1, phase2_train_steps=1, num_class_images=1, img_log_steps=0, device='cpu'"
    names: dict = {}
    exec(code.replace('weights="sd21-base"', short), names)
    assert (names["run"] / "concepts.safetensors").exists()


def test_python_for_notebooks_runs():
    (code,) = blocks(ROOT / "docs" / "reading.md", "python")
    names: dict = {}
    exec(code, names)
    models, ids = names["models"], names["models"].tokenizer(names["prompt"]).input_ids
    assert models.tokenizer.convert_ids_to_tokens(ids)[6] == "star</w>"
    assert names["star"].shape == (1, 1, 16, 16)
    shapes = {m.layer: tuple(m.probs.shape) for m in names["maps"]}
    assert shapes["up_blocks.1.attentions.0"] == (1, 4, 8, 8, 77)
    assert len(shapes) == len(names["maps"])
    assert [maps.shape for maps in names["seen"]] == [(1, 16, 16, 77)] * 10
    assert names["image"].size == (64, 64)
    assert not names["latents"].clone().is_inference()
    models.unet.get_submodule("mid_block.resnets.0")


def test_json_of_the_pages_is_json():
    texts = [block for page in PAGES for block in blocks(page, "json")]
    assert len(texts) >= 3
    for text in texts:
        json.loads(text)


def test_the_page_says_which_settings_a_file_takes(capsys):
    """Of each command: what it names is taken, or refused, as it says."""
    text = (ROOT / "docs" / "commands.md").read_text()
    section = text.split("## Settings files")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `bas ")]
    known = {
        "train": setting_rows(TrainConfig),
        "sample": setting_rows(SampleConfig) | setting_rows(sample.Request),
        "evaluate": setting_rows(TrainConfig),
    }
    assert [command.split()[1].strip("`") for command, *_ in rows] == list(known)
    for settings, (_, takes, refuses) in zip(known.values(), rows, strict=True):
        assert set(re.findall("`([a-z_]+)`", takes)) <= settings.keys()
        assert not set(re.findall("`([a-z_]+)`", refuses)) & settings.keys()
    assert {*re.findall("`([a-z_]+)`", rows[1][1])} >= {*setting_rows(sample.Request)}
    assert main(["sample", "--help"]) == 0
    flags = {*re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)} - {"debug", "config"}
    assert {*re.findall("`([a-z_]+)`", rows[1][2])} == flags - known["sample"].keys()
    own = re.search(r"each trial has of its own:(.*?)\.", section, re.DOTALL)
    assert {*re.findall("`([a-z_]+)`", own[1])} == evaluate.PER_TRIAL
