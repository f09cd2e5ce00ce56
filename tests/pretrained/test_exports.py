"""Exports of small runs: the files are as the formats say, and diffusers draws with them what bas draws."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bas.cli.entry import main
from bas.cli.inspection import describe
from bas.config import SampleConfig, TrainConfig
from bas.io.json_files import write_json
from bas.io.run_files import TIMES
from bas.models.adapters import Change, adapted_layers, add_adapters
from bas.models.config import UNetConfig, VAEConfig
from bas.pretrained.additions import Additions
from bas.pretrained.embedding_files import file_names, write_embedding
from bas.pretrained.exports import Targets, adapters_of, how_to_use
from bas.pretrained.folder import build_networks, load, read_parts, save_model
from bas.pretrained.hub import find_spec
from bas.pretrained.ldm_keys import from_original, to_original
from bas.pretrained.lora_files import common_alpha, kohya_tensors, peft_tensors
from bas.pretrained.merging import joined
from bas.pretrained.single_file import save_single_file
from bas.sampling.prompt_strength import encode_prompts
from bas.sampling.sampler import generate
from tests.helpers.cases import some_fast
from tests.helpers.families import tiny
from tests.helpers.small_runs import LORA, write_small_run
from tests.helpers.tiny import refused

PROMPT = "a photo of <asset0> and <asset1> at the beach"
STEPS = 2


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """An empty folder to write into."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn_by_bas(folder) -> torch.Tensor:
    """The latents that bas draws for the prompt, from seed 0."""
    config = SampleConfig(num_inference_steps=STEPS, guidance_scale=1.0, height=64, width=64)
    return generate([PROMPT], [0], load(folder), config)


def pipeline(base, lora, embeddings) -> StableDiffusionPipeline:
    """diffusers' pipeline of the base, with the files loaded into it."""
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, feature_extractor=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    for token, file in embeddings.items():
        pipe.load_textual_inversion(file, token=token)
    return pipe


def drawn_by_diffusers(pipe) -> torch.Tensor:
    """The latents that diffusers draws for the same prompt from the same noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"height": 64, "width": 64, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    return pipe(PROMPT, latents=noise, output_type="latent", **settings).images


def write(run, target: str, *flags: str) -> None:
    """`bas export RUN FILE`."""
    assert main(["export", str(run), target, *flags]) == 0


def metadata(path) -> dict[str, str]:
    """The texts in a file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


# --- diffusers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_draws_the_same_latents(base, run, cwd, form, capsys):
    """load_lora_weights and load_textual_inversion open the files: latents after two steps agree to 1e-5, and differ
    from those without the LoRA by far more."""
    write(run, "creature.safetensors", "--format", form)
    assert [*cwd.glob("*.safetensors")] != []
    embeddings = {handle: cwd / f"{handle[1:-1]}.safetensors" for handle in ("<asset0>", "<asset1>")}
    expected = drawn_by_bas(run)
    pipe = pipeline(base, cwd / "creature.safetensors", embeddings)
    assert (drawn_by_diffusers(pipe) - expected).abs().max() < 1e-5
    if form == "peft":  # the scales are in the weights, so the metadata may be lost
        save_file(load_file(cwd / "creature.safetensors"), cwd / "bare.safetensors")
        bare = pipeline(base, cwd / "bare.safetensors", embeddings)
        assert (drawn_by_diffusers(bare) - expected).abs().max() < 1e-5
    assert (drawn_by_diffusers(pipeline(base, None, embeddings)) - expected).abs().max() > 1e-2
    out = capsys.readouterr().out
    assert "load_lora_weights" in out
    assert ("embedding:asset0" in out) == (form == "kohya")


def test_values_and_keys_of_a_full_rank_lora_are_those_of_the_run(base, cwd):
    """A run by --train kv: diffusers draws with the LoRA of full rank what bas draws, to 1e-5."""
    run = write_small_run(cwd / "run", base, train="kv")
    write(run, "kv.safetensors", "--rank", "64")
    embeddings = {handle: cwd / f"{handle[1:-1]}.safetensors" for handle in ("<asset0>", "<asset1>")}
    expected = drawn_by_bas(run)
    assert (drawn_by_diffusers(pipeline(base, cwd / "kv.safetensors", embeddings)) - expected).abs().max() < 1e-5
    assert len({float(t) for name, t in load_file(cwd / "kv.safetensors").items() if name.endswith(".alpha")}) == 1


def test_embeddings_give_the_states_of_the_handles(base, run, cwd):
    """The rows in the files are those of the run, bit for bit, and diffusers' token is the handle."""
    write(run, "creature.safetensors")
    rows = load_file(run / "concepts.safetensors")["handles"]
    for i, name in enumerate(("asset0", "asset1")):
        tensors = load_file(cwd / f"{name}.safetensors")
        assert tensors.keys() == {"emb_params"}
        assert torch.equal(tensors["emb_params"], rows[i : i + 1])
        assert metadata(cwd / f"{name}.safetensors")["bas.handle"] == f"<{name}>"


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_reads_an_embedding_of_several_vectors(base, cwd, vectors):
    """The states of a prompt with it are those that bas computes, with no difference at all."""
    rows = torch.randn(vectors, 64, generator=torch.Generator().manual_seed(vectors))
    write_embedding(cwd / "toy.safetensors", [rows], {})
    models = load(base, additions=Additions(embeddings=(cwd / "toy.safetensors",)))
    pipe, prompt = pipeline(base, None, {"<toy>": cwd / "toy.safetensors"}), "a photo of <toy> at the beach"
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    ours = encode_prompts(models.text_encoders, models.tokenizer, [prompt]).states
    assert torch.equal(ours, theirs)


# --- The files ----------------------------------------------------------------------------------------------------


def test_a_kohya_file_has_kohyas_names_and_one_alpha(base, run, cwd):
    """Three tensors a layer, 1x1 convolutions as the module has them, one alpha although there are two ranks."""
    write(run, "creature.safetensors")
    tensors, sd2 = load_file(cwd / "creature.safetensors"), base.parent.name.startswith("sd2")
    layers = {name.rsplit(".", 2 if name.endswith("weight") else 1)[0] for name in tensors}
    assert len(tensors) == 3 * len(layers)
    assert all(name.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for name in layers)
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_te_text_model_encoder_layers_1_mlp_fc2",
    ):
        assert name in layers
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {3.0}
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")}
    assert ranks == {3, 4}
    projection = tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"]
    assert projection.ndim == (2 if sd2 else 4)


def kohyas_layers(depth: int) -> set[str]:
    """The layers that kohya's scripts adapt by default in SD 1 (depth 12) and SD 2 (depth 23), by their names."""
    levels = {"down_blocks": (0, 1, 2), "up_blocks": (1, 2, 3)}
    places = [f"down_blocks_{level}_attentions_{i}" for level in levels["down_blocks"] for i in range(2)]
    places += [f"up_blocks_{level}_attentions_{i}" for level in levels["up_blocks"] for i in range(3)]
    places += ["mid_block_attentions_0"]
    attention = [f"{attn}_{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out_0")]
    inside = [f"transformer_blocks_0_{part}" for part in (*attention, "ff_net_0_proj", "ff_net_2")]
    unet = {f"lora_unet_{place}_{part}" for place in places for part in ("proj_in", "proj_out", *inside)}
    parts = [*(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
    return unet | {f"lora_te_text_model_encoder_layers_{i}_{part}" for i in range(depth) for part in parts}


@pytest.mark.parametrize(("name", "layers"), [("sd15", 264), ("sd21-base", 330)])
def test_a_full_size_file_has_three_tensors_for_each_layer(name, layers):
    """The default LoRA, without values: kohya's 192 layers of the UNet, and 72 or 138 of the text encoder, by name."""
    models = build_networks(find_spec(name))
    add_adapters(models, TrainConfig(train="lora"), 0)
    adapters = {
        part: {
            layer.removeprefix("text_model."): Change(adapted.lora_A.weight, adapted.lora_B.weight, 1.0)
            for layer, adapted in adapted_layers(getattr(models, part))
        }
        for part in ("unet", "text_encoder")
    }
    tensors, texts = kohya_tensors(adapters)
    expected = kohyas_layers({"sd15": 12, "sd21-base": 23}[name])
    assert len(expected) == layers
    roles = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{layer}.{role}" for layer in expected for role in roles}
    assert (texts["ss_network_dim"], texts["ss_network_alpha"]) == ("16", "16.0")
    shapes = {tuple(tensors[name].shape) for name in tensors if name.endswith("attentions_0_proj_in.lora_down.weight")}
    assert {len(shape) for shape in shapes} == ({4} if name == "sd15" else {2})


def test_metadata_and_card_say_what_programs_show(base, run, cwd):
    sd2 = base.parent.name.startswith("sd2")
    run = shutil.copytree(run, cwd / "run")
    session = {"started": "2000-01-01T00:00:00+00:00", "device": "cpu", "versions": {}, "stages": []}
    write_json(run / TIMES, {"sessions": [session]})
    write(run, "creature.safetensors")
    texts = metadata(cwd / "creature.safetensors")
    assert texts["ss_v2"] == str(sd2)
    assert texts["ss_base_model_version"] == ("sd_v2" if sd2 else "sd_v1")
    assert (texts["ss_network_module"], texts["ss_network_dim"], texts["ss_network_alpha"]) == (
        "networks.lora",
        "Dynamic",
        "3.0",
    )
    assert json.loads(texts["ss_network_args"]) == {"conv_dim": 3, "conv_alpha": 3.0}
    assert json.loads(texts["ss_dataset_dirs"]) == {"scene": {"n_repeats": 1, "img_count": 1}}
    assert texts["modelspec.resolution"] == "128x128"
    assert (texts["ss_training_started_at"], texts["modelspec.date"]) == ("946684800.0", "2000-01-01T00:00:00+00:00")
    assert texts["modelspec.architecture"] == ("stable-diffusion-v2-512/lora" if sd2 else "stable-diffusion-v1/lora")
    assert json.loads(texts["ss_tag_frequency"])["scene"].keys() == {"asset0", "asset1"}
    assert json.loads(texts["bas.handles"]) == ["<asset0>", "<asset1>"]
    card = json.loads((cwd / "creature.json").read_text())
    assert card["activation text"] == "asset0, asset1"
    assert card["sd version"] == ("SD2" if sd2 else "SD1")


def test_a_difference_file_holds_what_the_weights_changed_by(base, cwd):
    """A run by --train v without --rank: `.diff` is the new weight minus that of the base, to 1e-6.

    A LoRA stands beside it, of rank 64, which here is the whole rank: it gives the same weights to 5e-6.
    """
    run = write_small_run(cwd / "run", base, train="v")
    write(run, "v.safetensors")
    tensors = load_file(cwd / "v.safetensors")
    assert all(name.endswith("attn2_to_v.diff") for name in tensors)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    before, after = (load(folder).unet.get_submodule(name).weight for folder in (base, run))
    assert (tensors[f"lora_unet_{name.replace('.', '_')}.diff"] - (after - before)).abs().max() < 1e-6
    beside = load(base, additions=Additions(loras=((cwd / "v-lora.safetensors", 1.0),)))
    assert (beside.unet.get_submodule(name).weight - after).abs().max() < 5e-6
    told = describe(cwd / "v.safetensors")
    assert (told["differences"], told["ranks"]) == (f"of {len(tensors)} whole weights", [])
    assert main(["export", str(run), "w.safetensors", "--format", "peft"]) == 2


def test_a_file_in_fp16_keeps_every_change(base, run, cwd):
    """Each change of a weight within 1e-3 of its float32, and no zero where float32 has a number above 6e-8."""
    write(run, "whole.safetensors")
    write(run, "half.safetensors", "--save_precision", "fp16")
    whole, half = load_file(cwd / "whole.safetensors"), load_file(cwd / "half.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    for name in whole:
        assert not ((half[name] == 0) & (whole[name].abs() > 6e-8)).any()
        if name.endswith("lora_down.weight"):
            up = name.replace("_down.", "_up.")
            one, other = (Change(file[name], file[up], 1.0).delta() for file in (whole, half))
            assert (one - other).norm() <= 1e-3 * one.norm()


def test_no_file_has_two_alphas():
    """Whatever ranks and scales the layers have, negative ones and merged ones too, the file has one alpha and the same
    changes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        layers = {}
        for i in range(4):
            rank = int(torch.randint(1, 9, (1,), generator=generator))
            scale = float(torch.randn(1, generator=generator)) * 3
            down, up = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
            change = Change(down, up, scale)
            layers[f"layer{i}"] = joined([(change, 1.0), (change, scale)]) if i % 2 else change
        tensors, _ = kohya_tensors({"unet": layers})
        (alpha,) = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
        assert alpha == float(torch.tensor(alpha).bfloat16()) == common_alpha(layers) > 0
        for name, change in layers.items():
            down, up = (tensors[f"lora_unet_{name}.lora_{part}.weight"] for part in ("down", "up"))
            read = Change(down, up, alpha / len(down))
            assert torch.allclose(read.delta(), change.delta(), atol=1e-5, rtol=1e-5)
        plain, _ = peft_tensors({"unet": layers})
        product = plain["unet.layer0.lora_B.weight"] @ plain["unet.layer0.lora_A.weight"]
        assert torch.allclose(product, layers["layer0"].delta(), atol=1e-5)


def test_a_bundle_holds_the_embeddings_too(run, cwd, caplog):
    """--bundle: rows under bundle_emb.NAME.string_to_param.*, the LoRA unchanged; bas reads the LoRA and names them."""
    write(run, "plain.safetensors")
    write(run, "bundle.safetensors", "--bundle")
    plain, bundle = load_file(cwd / "plain.safetensors"), load_file(cwd / "bundle.safetensors")
    added = {name for name in bundle if name not in plain}
    assert added == {f"bundle_emb.{name}.string_to_param.*" for name in ("asset0", "asset1")}
    assert all(torch.equal(plain[name], bundle[name]) for name in plain)
    rows = load_file(run / "concepts.safetensors")["handles"]
    assert torch.equal(bundle["bundle_emb.asset1.string_to_param.*"], rows[1:])
    assert main(["export", str(run), "b.safetensors", "--format", "peft", "--bundle"]) == 2


def test_an_image_of_the_run_is_the_preview(run, cwd):
    """The last preview of all concepts, else the scene; A1111 shows NAME.preview.png."""
    copy = shutil.copytree(run, cwd / "run")
    for place in ("scene/img.png", "previews/pictures/step-000200/sample-0.png"):
        (copy / place).parent.mkdir(parents=True)
        (copy / place).write_bytes(place.encode())
        write(copy, "a.safetensors")
        assert (cwd / "a.preview.png").read_bytes() == place.encode()


# --- Single files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some_fast(("sd1", "sd2-v"), "sd2-v"))
def test_a_single_file_and_its_embeddings_are_the_run(family, cwd, capsys):
    """`--format single` of a small run: read back with --embedding, bas predicts what the run gives, to 5e-6.

    ComfyUI finds the parts by these beginnings, has CLIP's 49408 rows fixed, and takes the one tensor of an embedding
    file for the rows of its name. Beside an SD 2 of velocity lies the configuration that A1111 reads, which tells it
    where the file does not.
    """
    save_model(tiny(family, whole_vocabulary=True), cwd / "base")
    run = write_small_run(cwd / "run", cwd / "base", **LORA)
    write(run, "whole.safetensors", "--format", "single")
    files = tuple(cwd / f"asset{i}.safetensors" for i in (0, 1))
    again = load(cwd / "whole.safetensors", additions=Additions(embeddings=files))
    assert again.handles == ("<asset0>", "<asset1>")
    assert len(load(cwd / "whole.safetensors").tokenizer) == 49408
    config = SampleConfig(num_inference_steps=STEPS, guidance_scale=1.0, height=64, width=64)
    assert (generate([PROMPT], [0], again, config) - drawn_by_bas(run)).abs().max() < 5e-6
    assert json.loads((cwd / "whole.json").read_text())["activation text"] == "asset0, asset1"
    assert "CheckpointLoaderSimple whole" in capsys.readouterr().out
    tensors, rows = load_file(cwd / "whole.safetensors"), load_file(run / "concepts.safetensors")["handles"]
    parts = {"model.diffusion_model", "first_stage_model", "cond_stage_model"}
    assert {next(part for part in parts if name.startswith(f"{part}.")) for name in tensors} == parts
    (table,) = (tensor for name, tensor in tensors.items() if name.endswith("token_embedding.weight"))
    assert table.shape == (49408, 64)
    for i, file in enumerate(files):
        (own,) = load_file(file).values()
        assert torch.equal(own, rows[i : i + 1])
    assert (cwd / "whole.yaml").exists() == (family == "sd2-v")
    if family == "sd2-v":
        params = json.loads((cwd / "whole.yaml").read_text())["model"]["params"]
        assert (params["parameterization"], params["scale_factor"]) == ("v", 0.18215)
        unet = params["unet_config"]["params"]
        assert (unet["model_channels"], unet["channel_mult"], unet["context_dim"]) == (32, [1, 2, 4], 64)
        assert unet["attention_resolutions"] == [1, 2]
        save_file(load_file(cwd / "whole.safetensors"), cwd / "whole.safetensors")  # without metadata
        assert read_parts(cwd / "whole.safetensors", None).spec.schedule.prediction_type == "v_prediction"


def test_a_single_file_of_sd2_holds_what_strict_readers_look_for():
    """With 23 layers: the 24th equals the 23rd, a projection of ones and a scale; bas reads it as before."""
    text = {
        f"encoder.layers.{i}.{name}": torch.full((1,), float(i)) for i in range(23) for name in ("layer_norm1.bias",)
    }
    text |= {"final_layer_norm.weight": torch.ones(4)}
    original = to_original({"unet": {}, "vae": {}, "text_encoder": text}, UNetConfig(), VAEConfig(), open_clip=True)
    layer = "cond_stage_model.model.transformer.resblocks.{}.ln_1.bias"
    assert torch.equal(original[layer.format(23)], original[layer.format(22)])
    assert original["cond_stage_model.model.text_projection"].shape == (4, 4)
    assert original["cond_stage_model.model.logit_scale"].shape == ()
    assert from_original(original, UNetConfig(), VAEConfig())["text_encoder"].keys() == text.keys()


# --- Names --------------------------------------------------------------------------------------------------------


def test_a_name_that_is_an_ordinary_word_is_told(tmp_path):
    """A1111 looks for the names of embeddings anywhere in a prompt; of two tokens they are found only as a whole."""
    told = "A1111, Forge take dog and Mug in any prompt for the concept: --prefix my- avoids it"
    for stems, form, last in (
        (("dog", "asset0", "Mug"), "kohya", told),
        (("dog", "asset0", "Mug"), "single", told),
        (("dog", "asset0", "Mug"), "peft", None),
        (("asset0", "my-dog"), "kohya", None),
    ):
        files = Targets(tmp_path / "m.safetensors", {f"<{stem}>": tmp_path / f"{stem}.safetensors" for stem in stems})
        lines = how_to_use(files, form, xl=False)
        assert [line for line in lines if "--prefix" in line] == ([last] if last else [])


def test_names_that_a_disk_takes_for_one_are_told_apart():
    """<Toy> and <toy> would be one file on Windows and macOS; the mapping is reversible."""
    names = file_names(("<Toy>", "<toy>", "<toy-2>"), "")
    assert names == {"<Toy>": "Toy", "<toy>": "toy-2", "<toy-2>": "toy-2-2"}
    assert len({name.lower() for name in names.values()}) == 3
    assert file_names(("<toy>",), "creature-") == {"<toy>": "creature-toy"}
    with refused("'my toy': a name has 1 to 32 letters a-z or A-Z, digits, _ or -; choose another --prefix"):
        file_names(("<toy>",), "my ")


def test_a_name_that_had_to_change_is_told(base, cwd, capsys):
    """The export prints it, and the file holds the handle that it stands for."""
    run = write_small_run(cwd / "run", base, ("<Toy>", "<toy>"), train="lora", rank=1)
    write(run, "creature.safetensors")
    assert "<toy> is called toy-2" in capsys.readouterr().out.splitlines()
    assert [metadata(cwd / f"{name}.safetensors")["bas.handle"] for name in ("Toy", "toy-2")] == ["<Toy>", "<toy>"]


def test_what_cannot_be_exported_is_refused(base, run, cwd, tmp_path_factory, capsys):
    """A whole model as a LoRA, a LoRA with the name of a handle, a folder that is not there, adapters of tokens: one
    line, exit code 2."""
    token = write_small_run(tmp_path_factory.mktemp("token") / "run", base, train="token", rank=2)
    for words, part in (
        ([str(token), "a.safetensors"], "no adapters of single tokens; train with --train lora for them"),
        ([str(base), "a.safetensors", "--format", "kohya"], "is a whole model without adapters"),
        ([str(run), "asset0.safetensors"], "would be the file of <asset0>, too"),
        ([str(run), "nowhere/a.safetensors"], "in an existing folder"),
        ([str(run), "a.safetensors", "--rank", "0"], "--rank is 0"),
        ([str(run), "a.safetensors", "--prediction_type", "epsilon"], "--prediction_type has no effect with --format"),
        ([str(base), "a.safetensors", "--prefix", "my-"], "--prefix my- has no effect: "),
        ([str(run), f"{'a' * 235}.safetensors"], "aa.safetensors would be too long for this system: name a shorter"),
    ):
        assert main(["export", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
    assert [*cwd.iterdir()] == []


@pytest.mark.parametrize(
    ("name", "advice"), [("asset1.safetensors", "give another --prefix"), ("creature.json", "name another file")]
)
def test_a_folder_in_the_place_of_a_file_is_found_before_anything_is_written(run, cwd, capsys, name, advice):
    (cwd / name).mkdir()
    assert main(["export", str(run), "creature.safetensors"]) == 2
    assert f"{name} is a folder, and the export needs a file of that name: {advice}" in capsys.readouterr().err
    assert [path.name for path in cwd.iterdir()] == [name]


def test_a_file_is_not_replaced_silently(run, cwd, caplog):
    write(run, "creature.safetensors")
    caplog.clear()
    write(run, "creature.safetensors")
    beside, embeddings = caplog.messages
    assert beside == "creature.safetensors, creature.json will be replaced; name another file to keep them"
    assert embeddings == "asset0.safetensors, asset1.safetensors will be replaced; give another --prefix to keep them"


# --- Merging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tuned.safetensors", "concepts.safetensors", "settings.safetensors", "BASE"])
def test_no_file_of_the_model_is_replaced(base, run, tmp_path, name, capsys):
    """A run's own weights, its settings by way of the card, and its base's weights stay as they are."""
    moved, copy = shutil.copytree(base, tmp_path / "base"), shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    target = moved / "vae" / "diffusion_pytorch_model.safetensors" if name == "BASE" else copy / name
    assert main(["export", str(copy), str(target), "--base", str(moved)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is a file of the model that is exported: name another file" in line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_single_file_is_not_exported_onto_itself(tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_single_file(tiny("sd1", whole_vocabulary=True), file, torch.float32)
    before = file.read_bytes()
    assert main(["export", str(file), str(file), "--save_precision", "fp16"]) == 2
    assert "is a file of the model that is exported" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_merged_model_draws_the_same_and_needs_no_base(base, run, cwd):
    """`bas merge RUN --into_base`: latents equal those of the run to 5e-6, with the base gone; diffusers opens it."""
    expected = drawn_by_bas(run)
    assert main(["merge", str(run), "--into_base", "--output_dir", "whole"]) == 0
    away = shutil.move(base, base.parent / "away")
    try:
        assert (drawn_by_bas(cwd / "whole") - expected).abs().max() < 5e-6
    finally:
        shutil.move(away, base)
    pipe = pipeline(cwd / "whole", None, {})
    assert (drawn_by_diffusers(pipe) - expected).abs().max() < 1e-5
    assert main(["merge", str(base), "--into_base", "--output_dir", "again"]) == 2


@pytest.mark.parametrize("kind", ["lora", "kv"])
def test_a_small_run_may_be_the_base_of_another(run, tmp_path, kind):
    """Adapters add up, trained weights take the place of those of the base; handles and weights of both are there."""
    second = write_small_run(tmp_path / "second", run, ("<toy>",), **LORA | {"train": kind})
    models, first = load(second), load(run)
    assert models.handles == ("<asset0>", "<asset1>", "<toy>")
    table = models.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[-3:-1], first.text_encoder.get_input_embeddings().weight[-2:])
    adapters, _ = adapters_of(second)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    before, after = (each.unet.get_submodule(name).weight for each in (first, models))
    assert (before + adapters["unet"][name].delta() - after).abs().max() < 1e-6
    assert (before - after).abs().max() > 1e-3


def test_the_export_of_a_run_on_top_names_the_runs_below(run, cwd, capsys):
    """Other programs lack their adapters; a run on a whole model has none below it."""
    second = write_small_run(cwd / "second", run, ("<toy>",), **LORA)
    third = write_small_run(cwd / "third", second, ("<cup>",), **LORA)
    for small, below in ((run, None), (second, f"{run}"), (third, f"{second}, {run}")):
        write(small, f"{small.name}-lora.safetensors", "--prefix", small.name)
        told = [line for line in capsys.readouterr().out.splitlines() if "on top of" in line]
        line = f"The run was trained on top of {below}: export that too, and add it there"
        assert told == ([line] if below else [])


def test_adapters_of_a_run_are_its_changes(base, run):
    """What is exported is what loading adds: the base's weight and the change give the loaded weight, to 1e-6."""
    adapters, spec = adapters_of(run)
    assert spec.handles == ()
    for name in ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", "down_blocks.0.downsamplers.0.conv"):
        before, after = (load(folder).unet.get_submodule(name).weight for folder in (base, run))
        assert (before + adapters["unet"][name].delta() - after).abs().max() < 1e-6
