"""What takes the place of parts of a model while it is loaded: another VAE, an earlier layer of the text encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bas.cli.entry import main
from bas.models.text import encode_ids, tokenize
from bas.pretrained.additions import Additions
from bas.pretrained.exports import adapters_of
from bas.pretrained.folder import load, save_model
from bas.pretrained.ldm_keys import VAE
from bas.pretrained.lora_files import write_lora
from bas.pretrained.single_file import save_single_file
from tests.helpers.families import VAE_FILE, change_json, change_tensors, tiny
from tests.helpers.small_runs import LORA, write_base, write_small_run
from tests.helpers.tiny import refused


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another VAE in each layout that is read: a folder, its file, the original names, and a whole model's file."""
    place = tmp_path_factory.mktemp("vae")
    models = tiny("sd1", whole_vocabulary=True, seed=1)
    save_model(models, place)
    save_single_file(models, place / "whole.safetensors")
    original = load_file(place / "whole.safetensors")
    inside = {name.removeprefix(VAE): tensor for name, tensor in original.items() if name.startswith(VAE)}
    save_file(inside | {"loss.logvar": torch.zeros(1)}, place / "original.safetensors")
    older = shutil.copytree(place / "vae", place / "older")
    change_tensors(older / Path(VAE_FILE).name, with_older_names)
    files = {"folder": "vae", "file": VAE_FILE, "original": "original.safetensors", "whole": "whole.safetensors"}
    files |= {"older folder": "older", "older file": f"older/{Path(VAE_FILE).name}"}
    return models.vae, {kind: place / file for kind, file in files.items()}


def with_older_names(tensors: dict[str, torch.Tensor]) -> None:
    """Name the layers of attention as diffusers did before 0.18, as in sd-vae-ft-mse."""
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        for name in [name for name in tensors if f".attentions.0.{new}." in name]:
            tensors[name.replace(new, old)] = tensors.pop(name)


@pytest.mark.parametrize("kind", ["folder", "file", "original", "whole", "older folder", "older file"])
def test_another_vae_takes_the_place_of_the_models(kind, saved, other):
    vae, files = other
    models, plain = load(saved, additions=Additions(vae=files[kind])), load(saved)
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in models.vae.state_dict().items())
    assert torch.equal(models.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert not torch.equal(models.vae.post_quant_conv.weight, plain.vae.post_quant_conv.weight)


def test_a_vae_may_lie_in_a_whole_model_and_in_half_precision(saved, other, tmp_path):
    """The folder of a model gives its VAE, and a folder in fp16 alone is read as that of a model."""
    vae, files = other
    half = shutil.copytree(files["folder"], tmp_path / "vae")
    weights = half / "diffusion_pytorch_model.safetensors"
    save_file({name: t.half() for name, t in load_file(weights).items()}, weights.with_suffix(".fp16.safetensors"))
    weights.unlink()
    for path, wanted in ((files["folder"].parent, vae.state_dict()), (half, vae.half().float().state_dict())):
        found = load(saved, additions=Additions(vae=path)).vae.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_a_broken_vae_is_named_itself(saved, other, tmp_path):
    """The model is not at fault; and another class of VAE is refused by its name."""
    _, files = other
    folder = shutil.copytree(files["folder"], tmp_path / "vae")
    change_tensors(folder / "diffusion_pytorch_model.safetensors", lambda t: t["decoder.conv_in.bias"].fill_(torch.nan))
    with refused(f"{folder} (vae) holds broken weights (1): decoder.conv_in.bias"):
        load(saved, additions=Additions(vae=folder))
    change_json(folder / "config.json", _class_name="AutoencoderTiny")
    with refused(str(folder), "'AutoencoderTiny' as its vae"):
        load(saved, additions=Additions(vae=folder))


@pytest.mark.parametrize("flag", ["--lora", "--embedding", "--vae", "--base", "--config", "--layout"])
def test_a_path_too_long_for_the_system_is_a_wrong_input(saved, flag, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line."""
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(saved), "--prompt", "a bowl", flag, "x" * 300]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "xxx" in line


def test_images_name_what_changed_the_model(saved, other, tmp_path, monkeypatch):
    """The VAE and the clip skip, from flags and from a settings file; flags override the file."""
    _, files = other
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(
        f'vae = "{files["file"]}"\nclip_skip = 2\nnum_inference_steps = 1\nheight = 64\nwidth = 64\n'
    )
    words = ["sample", str(saved), "--prompt", "a bowl", "--device", "cpu", "--config", "c.toml"]
    assert main([*words, "--output_path", "a.png"]) == 0
    assert main([*words, "--output_path", "b.png", "--clip_skip", "1"]) == 0
    found = [json.loads(Image.open(name).info["bas"]) for name in ("a.png", "b.png")]
    assert [(settings["vae"], settings["clip_skip"]) for settings in found] == [(str(files["file"]), n) for n in (2, 1)]


def test_what_is_no_vae_of_this_family_is_refused(saved, other, tmp_path):
    _, files = other
    with refused("holds no VAE: give the file or folder of one"):
        load(saved, additions=Additions(vae=saved / "unet" / "diffusion_pytorch_model.safetensors"))
    config = (files["folder"] / "config.json").read_text().replace('"latent_channels": 4', '"latent_channels": 16')
    (tmp_path / "config.json").write_text(config)
    with refused("its latents are not those of", "take a VAE of the model's family"):
        load(saved, additions=Additions(vae=tmp_path))


def test_a_vae_of_another_scale_is_refused(saved, other, tmp_path):
    """SDXL's VAE has the same shapes as that of SD 1 and 2, and other latents."""
    _, files = other
    folder = shutil.copytree(files["folder"], tmp_path / "vae")
    change_json(folder / "config.json", scaling_factor=0.13025)
    with refused("its latents are scaled by 0.13025, those of", "by 0.18215: take a VAE of the model's family"):
        load(saved, additions=Additions(vae=folder))
    whole = load_file(files["whole"])
    marked = "conditioner.embedders.1.model.ln_final.bias"
    save_file(whole | {marked: torch.zeros(4)}, tmp_path / "xl.safetensors")
    with refused("xl.safetensors: its latents are scaled by 0.13025"):
        load(saved, additions=Additions(vae=tmp_path / "xl.safetensors"))
    xl = tiny("sdxl")
    save_model(xl, tmp_path / "xl")
    with refused("its latents are scaled by 0.18215, those of", "by 0.13025"):
        load(tmp_path / "xl", additions=Additions(vae=files["whole"]))


def test_an_earlier_layer_is_read_through_the_final_norm(saved):
    """2 is the last layer but one, as web interfaces count; 1 changes nothing, and there must be so many layers."""
    prompt, whole = "a photo of a bowl", load(saved)
    found = {}
    for skip in (None, 1, 2):
        models = load(saved, additions=Additions.read((), (), clip_skip=skip))
        with torch.no_grad():
            found[skip] = encode_ids(models.text_encoders, tokenize(models.tokenizer, [prompt])).states
    with torch.no_grad():
        ids = tokenize(whole.tokenizer, [prompt])
        last_but_one = whole.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        expected = whole.text_encoder.final_layer_norm(last_but_one)
    assert torch.equal(found[1], found[None])
    torch.testing.assert_close(found[2], expected, atol=1e-6, rtol=0)
    assert (found[2] - found[1]).abs().max() > 0.01
    with refused("--clip_skip 3: the text encoder of", "has 2 layers"):
        load(saved, additions=Additions.read((), (), clip_skip=3))
    with refused("--clip_skip is 0"):
        Additions.read((), (), clip_skip=0)


def test_a_lora_may_change_layers_that_are_left_out(tmp_path):
    """kohya's scripts adapt all layers: with both flags, the layers that are read have the changes of the file."""
    write_base(tmp_path / "base", "sd1")
    run = write_small_run(tmp_path / "run", tmp_path / "base", **LORA)
    adapters, _ = adapters_of(run)
    assert any(name.startswith("encoder.layers.1.") for name in adapters["text_encoder"])
    write_lora(tmp_path / "a.safetensors", adapters, "kohya", torch.float32, {})
    file = [str(tmp_path / "a.safetensors")]
    whole, cut = (load(tmp_path / "base", additions=Additions.read(file, (), clip_skip=n)) for n in (None, 2))
    assert len(cut.text_encoder.encoder.layers) == 1
    ids = tokenize(whole.tokenizer, ["a photo of a bowl"])
    with torch.no_grad():
        last_but_one = whole.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        expected = whole.text_encoder.final_layer_norm(last_but_one)
        assert torch.allclose(encode_ids(cut.text_encoders, ids).states, expected, atol=1e-6)
        plain = load(tmp_path / "base", additions=Additions.read((), (), clip_skip=2))
        assert not torch.allclose(encode_ids(plain.text_encoders, ids).states, expected, atol=1e-3)


def test_sdxl_takes_a_vae_but_no_other_layer(tmp_path):
    save_model(tiny("sdxl"), tmp_path)
    read = load(tmp_path, additions=Additions(vae=tmp_path / "vae", clip_skip=2))
    assert read.text_encoder.config.num_hidden_layers == 2
    with refused("--clip_skip 1: SDXL reads the last layer but one, which is 2: leave it out"):
        load(tmp_path, additions=Additions(clip_skip=1))
