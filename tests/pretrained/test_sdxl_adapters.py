"""SDXL's small runs: their exports in diffusers, LoRA and embedding files read and refused, runs merged."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bas.cli.entry import main
from bas.cli.inspection import describe
from bas.config import SampleConfig, TrainConfig
from bas.io.run_files import handle_rows, read_concepts
from bas.models.adapters import adapted_layers, add_adapters, remove_adapters
from bas.models.text import encode_ids, tokenize
from bas.pretrained.additions import Additions
from bas.pretrained.embedding_files import write_embedding
from bas.pretrained.exports import adapters_of
from bas.pretrained.folder import build_networks, load, read_spec, save_model
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import find_spec, is_sdxl
from bas.pretrained.ldm_keys import rename, unet_table
from bas.pretrained.lora_files import kohya_tensors
from bas.pretrained.lora_names import KOHYA_XL, kohya_name, peft_name
from bas.pretrained.merging import attention_outputs
from bas.sampling.sampler import generate
from tests.helpers.families import tiny
from tests.helpers.small_runs import LORA, write_base, write_small_run
from tests.helpers.tiny import refused

PROMPT = "a photo of <asset0> and <asset1> at the beach"
SIZE = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 64, "width": 64}
SECOND = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # by key in an embedding file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny SDXL, and runs on it: of adapters on every kind of layer, another, of keys and values, single tokens."""
    place = tmp_path_factory.mktemp("sdxl adapters")
    base = write_base(place / "base", "sdxl")
    write_small_run(place / "toys", base, **LORA)
    write_small_run(place / "mugs", base, ("<asset0>",), train="lora", rank=2, seed=3)
    write_small_run(place / "kv", base, ("<ball>",), train="kv", seed=4)
    write_small_run(place / "v", base, ("<hat>",), train="v", seed=5)
    write_small_run(place / "token", base, ("<cat>",), train="token", rank=2, seed=6)
    write_small_run(place / "token too", base, ("<dog>",), train="token", rank=3, seed=7)
    return place


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty folder to write into."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(models) -> dict[str, torch.Tensor]:
    """All weights of the UNet and the text encoders but the token embeddings."""
    named = [
        (f"{part}.{name}", p)
        for part, network in models.networks.items()
        for name, p in network.named_parameters()
        if part != "vae" and "token_embedding" not in name
    ]
    return {name: p.detach() for name, p in named}


def furthest(ours, theirs) -> float:
    """The largest difference between the weights of two models."""
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def drawn_by_bas(folder, prompt=PROMPT, additions=None) -> torch.Tensor:
    """The latents that bas draws for the prompt, from seed 0. Networks compute in float64: kernels round alike."""
    return generate([prompt], [0], load(folder, dtype=torch.float64, additions=additions), SampleConfig(**SIZE))


def drawn_by_diffusers(base, lora=None, handles=(), folder=None, prompt=PROMPT) -> torch.Tensor:
    """The latents that diffusers draws from the same noise, with a LoRA and the handles' files loaded into the base."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reader under test")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base, local_files_only=True, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    for handle in handles:
        tensors = load_file(folder / f"{handle[1:-1]}.safetensors")
        for key, tokenizer in (("clip_l", "tokenizer"), ("clip_g", "tokenizer_2")):
            own = {"text_encoder": getattr(pipe, SECOND[key]), "tokenizer": getattr(pipe, tokenizer)}
            pipe.load_textual_inversion(tensors[key], token=handle, **own)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe(prompt, latents=noise.double(), output_type="latent", **SIZE).images


# --- Exports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_draws_with_an_export_what_the_run_draws(place, cwd, form, capsys):
    """Adapters of two ranks on the UNet and both text encoders, and the handles' rows in both: latents after two
    guided steps agree to 1e-5, and differ from those without the LoRA by far more."""
    assert main(["export", str(place / "toys"), "creature.safetensors", "--format", form]) == 0
    expected, handles = drawn_by_bas(place / "toys"), ("<asset0>", "<asset1>")
    found = drawn_by_diffusers(place / "base", cwd / "creature.safetensors", handles, cwd)
    assert (found - expected).abs().max() < 1e-5
    files = Additions(embeddings=tuple(cwd / f"{handle[1:-1]}.safetensors" for handle in handles))
    assert (drawn_by_bas(place / "base", additions=files) - expected).abs().max() > 1e-2
    out = capsys.readouterr().out
    assert 'load_file("asset0.safetensors")["clip_l"], token="<asset0>"' in out
    assert ("embedding:asset0" in out) == (form == "kohya")


def test_keys_and_values_are_a_difference_and_a_lora_of_full_rank_is_them(place, cwd):
    """--train kv: `.diff` under the original names is what the weights changed by; diffusers draws with all of the
    rank what bas draws."""
    assert main(["export", str(place / "kv"), "whole.safetensors"]) == 0
    layer = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"
    before, after = (load(place / name).unet.get_submodule(layer).weight for name in ("base", "kv"))
    difference = load_file("whole.safetensors")["lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k.diff"]
    assert (difference - (after - before)).abs().max() < 1e-6
    assert main(["export", str(place / "kv"), "kv.safetensors", "--rank", "192"]) == 0
    prompt = "a photo of <ball>"
    found = drawn_by_diffusers(place / "base", cwd / "kv.safetensors", ("<ball>",), cwd, prompt)
    assert (found - drawn_by_bas(place / "kv", prompt)).abs().max() < 1e-5


def test_names_and_metadata_are_those_of_kohyas_scripts_for_sdxl(place, cwd):
    """The UNet's layers have the original code's names, text encoders `te1` and `te2`; one alpha in the file."""
    assert main(["export", str(place / "toys"), "creature.safetensors", "--bundle"]) == 0
    tensors = load_file("creature.safetensors")
    layers = {name.partition(".")[0] for name in tensors if not name.startswith("bundle_emb.")}
    assert {name for name in tensors if name.startswith("bundle_emb.")} == {
        f"bundle_emb.{name}.{key}" for name in ("asset0", "asset1") for key in SECOND
    }
    assert layers >= {
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_middle_block_1_transformer_blocks_1_attn1_to_out_0",
        "lora_unet_output_blocks_1_1_transformer_blocks_1_ff_net_0_proj",
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_input_blocks_2_0_op",
        "lora_unet_output_blocks_3_2_conv",
        "lora_te1_text_model_encoder_layers_0_mlp_fc2",
        "lora_te2_text_model_encoder_layers_2_self_attn_q_proj",
    }
    assert not any(name.startswith("lora_te1_text_model_encoder_layers_1") for name in layers)  # nothing reads it
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {3.0}
    with safe_open("creature.safetensors", "pt") as file:
        texts = file.metadata()
    assert (texts["ss_v2"], texts["ss_base_model_version"]) == ("False", "sdxl_base_v1-0")
    assert texts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert json.loads((cwd / "creature.json").read_text())["sd version"] == "SDXL"
    rows = handle_rows(read_concepts(place / "toys")[0])
    for i, name in enumerate(("asset0", "asset1")):
        for key, each in zip(SECOND, rows, strict=True):
            assert torch.equal(load_file(f"{name}.safetensors")[key], each[i : i + 1])
    told, embedding = describe(cwd / "creature.safetensors"), describe(cwd / "asset0.safetensors")
    assert (told["what"], told["for"], told["ranks"]) == ("a LoRA", "SDXL", [3, 4])
    assert told["base hash"] == weights_hash(place / "base")
    assert (embedding["for"], embedding["handle"], embedding["vectors"]) == ("SDXL", "<asset0>", [1, 1])
    told = describe(place / "toys", hashes=False)
    assert (told["loads"], told["family"], told["trained"]) == (True, "Stable Diffusion XL", "lora")
    assert (is_sdxl(str(place / "toys")), is_sdxl(str(place / "base"))) == (True, True)


def test_a_single_file_and_its_embeddings_are_the_run(cwd):
    """`--format single`: read back with --embedding, all weights and rows are those of the run."""
    save_model(tiny("sdxl", whole_vocabulary=True), cwd / "base")
    run = write_small_run(cwd / "run", cwd / "base", **LORA)
    assert main(["export", str(run), "whole.safetensors", "--format", "single"]) == 0
    files = Additions(embeddings=tuple(cwd / f"asset{i}.safetensors" for i in (0, 1)))
    models, own = load(cwd / "whole.safetensors", additions=files), load(run)
    assert (models.handles, models.schedule) == (own.handles, own.schedule)
    assert furthest(models, own) == 0
    for ours, theirs in zip(models.text_encoders, own.text_encoders, strict=True):
        assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_a_full_size_lora_has_the_layers_of_the_table():
    """Rank 1, without values, by sets of layers. The text encoders' are six fewer: nothing reads the last layer of the
    first."""
    counts, models = {}, build_networks(find_spec("sdxl"))
    for targets in ("kv", "attention", "transformer"):
        add_adapters(models, TrainConfig(train="lora", lora_targets=targets, rank=1), 0)
        for part in KOHYA_XL:
            layers = [layer for _, layer in adapted_layers(models.networks[part])]
            numbers = sum(layer.lora_A.weight.numel() + layer.lora_B.weight.numel() for layer in layers)
            counts[targets, part] = (len(layers), numbers)
            remove_adapters(models.networks[part])
    assert counts["kv", "unet"] == (140, 453_120)
    assert counts["attention", "unet"] == (560, 1_451_520)
    assert counts["transformer", "unet"] == (722, 2_659_840)
    assert (counts["attention", "text_encoder"][0], counts["attention", "text_encoder_2"][0]) == (44, 128)
    assert (counts["transformer", "text_encoder"][0], counts["transformer", "text_encoder_2"][0]) == (66, 192)


# --- Files read ---------------------------------------------------------------------------------------------------


def spellings(adapters, config) -> dict[str, dict[str, torch.Tensor]]:
    """The run's adapters as the files of other programs, by what is special about each."""
    original = kohya_tensors(adapters, config)[0]
    plain, peft, differences, comfyui = {}, {}, {}, {}
    for part, layers in adapters.items():
        for layer, change in layers.items():
            name = KOHYA_XL[part] + kohya_name("unet", layer).removeprefix("lora_unet_")
            name = name if part == "unet" else name.replace("_encoder", "_text_model_encoder", 1)
            plain[f"{name}.lora_down.weight"] = change.down
            plain[f"{name}.lora_up.weight"] = change.scale * change.up
            differences[f"{name}.diff"] = change.delta()
            dotted = f"diffusion_model.{rename(layer, unet_table(config))}" if part == "unet" else name
            comfyui[f"{dotted}.lora_down.weight"] = change.down
            comfyui[f"{dotted}.lora_up.weight"] = change.scale * change.up
            peft[f"{peft_name(part, layer)}.lora_A.weight"] = change.down
            peft[f"{peft_name(part, layer)}.lora_B.weight"] = change.scale * change.up
    without = {name.replace("text_model.", ""): tensor for name, tensor in peft.items()}
    found = {"original": original, "diffusers": plain, "peft": peft, "without": without, "differences": differences}
    return found | {"comfyui": comfyui}


@pytest.mark.parametrize("spelling", ["original", "diffusers", "peft", "without", "differences", "comfyui"])
def test_every_spelling_gives_the_weights_of_the_run(place, cwd, spelling):
    """The base with the file equals the run that it came from, weight by weight, to 5e-6."""
    adapters, spec = adapters_of(place / "toys")
    tensors = {name: tensor.clone() for name, tensor in spellings(adapters, spec.unet)[spelling].items()}
    save_file(tensors, cwd / "a.safetensors")
    models = load(place / "base", additions=Additions(loras=((cwd / "a.safetensors", 1.0),)))
    assert furthest(models, load(place / "toys")) < 5e-6
    assert furthest(load(place / "base"), models) > 1e-2


KV = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
REFUSED = {
    "it is a LoRA for Stable Diffusion 2": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, 1024)
    },
    "a LoRA for Stable Diffusion 1": {
        f"{KV}.lora_down.weight": torch.zeros(4, 768),
        f"{KV}.lora_up.weight": torch.zeros(64, 4),
    },
    "has no up matrix": {f"{KV}.lora_down.weight": torch.zeros(4, 192)},
    "holds lora_te2_strange.alpha": {"lora_te2_strange.alpha": torch.zeros(())},
    "is a DoRA": {f"{KV}.dora_scale": torch.zeros(1, 64)},
    "is a LoRA for Stable Diffusion 1 or 2 by its names": {  # its one text encoder is SDXL's first
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 64),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(128, 4),
    },
}


def test_what_does_not_fit_sdxl_is_refused(place, cwd):
    """A LoRA for another family, half of a pair, a name without a place, embeddings of one encoder or of two widths."""
    for part, tensors in REFUSED.items():
        save_file(tensors, cwd / "a.safetensors")
        with refused(part, "a.safetensors"):
            read_spec(place / "base", None, Additions(loras=((cwd / "a.safetensors", 1.0),)))
    both = {"clip_l": torch.zeros(2, 64), "clip_g": torch.zeros(2, 128)}
    for part, tensors in {
        "holds rows for one text encoder": {"emb_params": torch.zeros(1, 64)},
        "holds 3 tensors": both | {"<other>": torch.zeros(1, 64)},
        "with rows of 96": both | {"clip_g": torch.zeros(2, 96)},
        "holds another number of vectors for each text encoder": both | {"clip_l": torch.zeros(1, 64)},
    }.items():
        save_file(tensors, cwd / "toy.safetensors")
        with refused(part, "toy.safetensors"):
            read_spec(place / "base", None, Additions(embeddings=(cwd / "toy.safetensors",)))


def test_embeddings_of_several_vectors_give_the_states_of_diffusers(place, cwd):
    """Three vectors in both encoders: states and pooled text of a prompt, with no difference at all."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reader under test")
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(3, width, generator=generator) for width in (64, 128)]
    write_embedding(cwd / "toy.safetensors", rows, {})
    models = load(place / "base", additions=Additions(embeddings=(cwd / "toy.safetensors",)))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(place / "base", local_files_only=True)
    for each, end in zip(rows, ("", "_2"), strict=True):
        encoder, tokenizer = getattr(pipe, f"text_encoder{end}"), getattr(pipe, f"tokenizer{end}")
        pipe.load_textual_inversion(each, token="<toy>", text_encoder=encoder, tokenizer=tokenizer)
    prompt = "a photo of <toy> at the beach"
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        ours = encode_ids(models.text_encoders, tokenize(models.tokenizer, [prompt]))
    assert torch.equal(ours.states, states)
    assert torch.equal(ours.pooled, pooled)


# --- Merging ------------------------------------------------------------------------------------------------------


def merge(place, target, *words: str) -> int:
    """`bas merge`, with runs by their names in the folder."""
    named = [str(place / word) if (place / word).is_dir() else word for word in words]
    return main(["merge", *named, "--output_dir", str(target)])


@pytest.mark.slow
def test_joined_runs_change_each_weight_by_the_sum(place, cwd):
    """Of the UNet and both text encoders, to 5e-6. As a whole model, diffusers draws with them what bas draws."""
    assert merge(place, cwd / "both", "toys", "mugs", "--weights", "0.7", "-0.5") == 0
    base, toys, mugs, both = (weights(load(f)) for f in (place / "base", place / "toys", place / "mugs", cwd / "both"))
    for name, weight in base.items():
        expected = weight + 0.7 * (toys[name] - weight) - 0.5 * (mugs[name] - weight)
        assert (both[name] - expected).abs().max() < 5e-6, name
    assert read_spec(cwd / "both").handles == ("<toys-asset0>", "<asset1>", "<mugs-asset0>")
    assert main(["merge", str(cwd / "both"), "--into_base", "--output_dir", "whole"]) == 0
    found = drawn_by_diffusers(cwd / "whole", prompt="a photo of <asset1>")
    assert (found - drawn_by_bas(cwd / "both", "a photo of <asset1>")).abs().max() < 1e-5


@pytest.mark.slow
def test_keys_and_values_of_several_runs_keep_those_of_each_concept(place, cwd, capsys):
    """The closed form: keys and values for the concepts' own prompts stay what they are in their runs, to 1e-4."""
    assert merge(place, cwd / "both", "kv", "v") == 0
    out = capsys.readouterr().out
    models = load(cwd / "both")
    for name, handle in (("kv", "<ball>"), ("v", "<hat>")):
        own, prompt = load(place / name), f"a photo of {handle}"
        states = [encode_ids(each.text_encoders, tokenize(each.tokenizer, [prompt])).states for each in (own, models)]
        line = tokenize(models.tokenizer, [prompt])[0].tolist()
        begin, end = (
            line.index(models.tokenizer.convert_tokens_to_ids(handle)),
            line.index(models.tokenizer.eos_token_id),
        )
        layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
        with torch.no_grad():
            before, after = (
                each.unet.get_submodule(layer)(state[:, begin : end + 1])
                for each, state in zip((own, models), states, strict=True)
            )
        assert (before - after).abs().max() < 1e-4 * before.abs().max()
        assert f"{handle}: its attention's output moved by " in out


@pytest.mark.slow
def test_adapters_of_single_tokens_stand_side_by_side(place, cwd):
    """Each concept's attention, and images, are those of its own run, and a prompt without handles is the base's."""
    assert merge(place, cwd / "both", "token", "token too") == 0
    assert read_spec(cwd / "both").adapted_tokens[-1][1] == 3
    models = load(cwd / "both")
    for name, handle in (("token", "<cat>"), ("token too", "<dog>")):
        own = load(place / name)
        for before, after in zip(attention_outputs(own, handle), attention_outputs(models, handle), strict=True):
            assert (before - after).abs().max() < 5e-6
    assert torch.equal(drawn_by_bas(cwd / "both", "a photo"), drawn_by_bas(place / "base", "a photo"))
    untouched = [drawn_by_bas(folder, "a photo of <cat>") for folder in (cwd / "both", place / "token")]
    assert (untouched[0] - untouched[1]).abs().max() < 1e-5
    assert (drawn_by_bas(place / "base", "a photo") - untouched[0]).abs().max() > 1e-3
