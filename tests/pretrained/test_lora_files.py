"""LoRA and embedding files are read whole, in every known format, or refused in one line that names the kind."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bas.cli.entry import main
from bas.cli.inspection import describe
from bas.io.run_files import TUNED
from bas.pretrained.additions import Additions, split_weight
from bas.pretrained.embedding_files import read_embedding
from bas.pretrained.exports import adapters_of
from bas.pretrained.folder import load, read_parts, read_spec
from bas.pretrained.hashes import base_hash, weights_hash
from bas.pretrained.ldm_keys import rename, unet_table
from bas.pretrained.lora_files import kohya_tensors, read_lora, trigger_words, write_lora
from bas.pretrained.lora_names import TRANSFORMER, kohya_name, peft_name
from tests.helpers.families import change_json, tiny
from tests.helpers.tiny import refused


@pytest.fixture(scope="module")
def parts(base):
    """The base as it lies on the disk."""
    return read_parts(base, None)


UNET = tiny("sd1").unet.config  # with as many layers as every base here
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "encoder.layers.1.mlp.fc1"


def weights(models) -> dict[str, torch.Tensor]:
    """All weights of the UNet and the text encoder but the token embedding."""
    named = [(f"unet.{n}", p) for n, p in models.unet.named_parameters()]
    named += [(f"text.{n}", p) for n, p in models.text_encoder.named_parameters() if "token_embedding" not in n]
    return {name: p.detach() for name, p in named}


def furthest(ours: dict, theirs: dict) -> float:
    """The largest difference between two sets of weights."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def kohya(adapters) -> dict[str, torch.Tensor]:
    """kohya's names, with alpha."""
    return kohya_tensors(adapters)[0]


def with_te1(adapters) -> dict[str, torch.Tensor]:
    """The prefix that diffusers' converter and OneTrainer write."""
    return {name.replace("lora_te_", "lora_te1_"): tensor for name, tensor in kohya(adapters).items()}


def folded(adapters, name_of, down: str, up: str) -> dict[str, torch.Tensor]:
    """A and B of each layer under these names, the scale folded into B: without alpha the strength alone counts."""
    tensors = {}
    for component, layers in adapters.items():
        for layer, change in layers.items():
            tensors[f"{name_of(component, layer)}.{down}.weight"] = change.down
            tensors[f"{name_of(component, layer)}.{up}.weight"] = change.scale * change.up
    return tensors


def without_alpha(adapters) -> dict[str, torch.Tensor]:
    """kohya's names, scales folded."""
    return folded(adapters, kohya_name, "lora_down", "lora_up")


def as_peft(adapters) -> dict[str, torch.Tensor]:
    """PEFT's names, scales folded."""
    return folded(adapters, peft_name, "lora_A", "lora_B")


def without_text_model(adapters) -> dict[str, torch.Tensor]:
    """What diffusers writes with transformers 5."""
    return {name.replace("text_model.", ""): tensor for name, tensor in as_peft(adapters).items()}


def old_diffusers(adapters) -> dict[str, torch.Tensor]:
    """The spelling of attention processors."""
    tensors = {}
    for component, layers in adapters.items():
        for layer, change in layers.items():
            name = peft_name(component, layer)
            if ".attn1." in name or ".attn2." in name:
                head, _, last = name.removesuffix(".0").rpartition(".")
                name = f"{head}.processor.{last}_lora"
            else:
                name = f"{name}.lora_linear_layer" if component == "text_encoder" else f"{name}.lora"
            tensors[f"{name}.down.weight"] = change.down
            tensors[f"{name}.up.weight"] = change.scale * change.up
    return tensors


def oldest_diffusers(adapters) -> dict[str, torch.Tensor]:
    """The spelling from before attention processors had a name in it, the same for the text encoder."""
    ends = {f"{name}_proj": f"to_{name}_lora" for name in ("q", "k", "v", "out")}
    tensors = {name.replace(".processor.", "."): tensor for name, tensor in old_diffusers(adapters).items()}
    for end, old in ends.items():
        tensors = {name.replace(f"{end}.lora_linear_layer", old): tensor for name, tensor in tensors.items()}
    assert any("self_attn.to_out_lora.up" in name for name in tensors)
    return tensors


def comfyui(adapters) -> dict[str, torch.Tensor]:
    """What ComfyUI's node LoraSave writes: the UNet's layers under their original names; kohya's names for the text."""
    tensors, table = kohya({part: layers for part, layers in adapters.items() if part != "unet"}), unet_table(UNET)
    for layer, change in adapters["unet"].items():
        name = f"diffusion_model.{rename(layer, table)}"
        tensors |= {f"{name}.lora_down.weight": change.down, f"{name}.lora_up.weight": change.scale * change.up}
    assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_up.weight" in tensors
    return tensors


def as_differences(adapters) -> dict[str, torch.Tensor]:
    """LyCORIS "full"."""
    return {
        f"{kohya_name(component, layer)}.diff": change.delta()
        for component, layers in adapters.items()
        for layer, change in layers.items()
    }


def of_an_adapter(adapters) -> dict[str, torch.Tensor]:
    """PEFT's names as its networks have them: a wrapper's name before them, the adapter's name inside."""
    return {
        name.replace("unet.", "unet.base_model.model.").replace(".lora_A.", ".lora_A.mine."): tensor
        for name, tensor in as_peft(adapters).items()
    }


SPELLINGS = (
    *(kohya, with_te1, without_alpha, as_peft, without_text_model, of_an_adapter),
    *(old_diffusers, oldest_diffusers, comfyui, as_differences),
)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_gives_the_weights_of_the_run(base, run, tmp_path, spelling):
    """The base with the file equals the run that it came from, weight by weight, to 5e-6."""
    adapters, _ = adapters_of(run)
    tensors = {name: tensor.clone() for name, tensor in spelling(adapters).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    models = load(base, additions=Additions(loras=((tmp_path / "a.safetensors", 1.0),)))
    assert furthest(weights(models), weights(load(run))) < 5e-6
    assert furthest(weights(load(base)), weights(load(run))) > 1e-2


@pytest.mark.filterwarnings("ignore:The following alpha_pattern:RuntimeWarning")  # one fits nothing, on purpose
@pytest.mark.parametrize("form", ["folder", "metadata"])
def test_files_that_peft_and_diffusers_write_count_as_there(base, tmp_path, form):
    """An adapter of PEFT on diffusers' UNet: what it predicts is what bas predicts, to 5e-6.

    One alpha for all layers that are named by their ends, others for those that a regular expression names, the first
    that matches, scaled by the rank's root (rsLoRA), and another rank for some. PEFT's own folder keeps that beside the
    weights, diffusers in their metadata.
    """
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    alphas = {r".*attn2\.to_[qv]": 9, "^mid_block.attentions.0.proj_in": 3, "to_q": 2, "n.proj_in": 50}
    settings = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": alphas}
    ends = ["to_q", "to_v", "to_out.0", "proj_in", "conv1"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=ends, use_rslora=True, init_lora_weights=False, **settings)
    torch.manual_seed(2)
    if form == "folder":
        network = get_peft_model(unet, config)
        network.save_pretrained(tmp_path / "lora")
    else:
        unet.add_adapter(config)
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / "lora", get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config.to_dict()
        )
    models = load(base, additions=Additions.read([str(tmp_path / "lora")], ()))
    z, states = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    with torch.no_grad():
        expected = unet(z, 500, states).sample
        assert (models.unet(z, 500, states).sample - expected).abs().max() < 5e-6 * expected.abs().max()
        assert (load(base).unet(z, 500, states).sample - expected).abs().max() > 1e-2
    told = describe(tmp_path / "lora")
    assert (told["what"], told["ranks"], told["alpha"]) == ("a LoRA", [2, 4], [2.0, 3.0, 6.0, 9.0, 50.0])


def test_settings_beside_a_file_are_a_part_of_it(base, tmp_path, caplog):
    """A base under whose LoRA alpha changes has another hash; without its settings, their lack is told."""
    folder, names = tmp_path / "lora", [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"]
    folder.mkdir()
    save_file(
        dict(zip(names, (torch.ones(2, 64), torch.ones(32, 2)), strict=True)), folder / "adapter_model.safetensors"
    )
    layer, found = load(base).unet.get_submodule(LAYER).weight, []
    for alpha in (2, 4):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha, "r": 2}))
        additions = Additions.read([str(folder)], ())
        found.append(base_hash(base, additions, remembered=False))
        changed = load(base, additions=additions).unet.get_submodule(LAYER).weight - layer
        assert torch.allclose(changed, torch.full_like(layer, alpha), atol=1e-5)
    assert found[0] != found[1]
    for text, part in (
        ('{"peft_type": "LOHA"}', "is a LOHA"),
        ('{"lora_alpha": "x"}', "cannot be read"),
        ('{"alpha_pattern": {"to_(q": 2}}', "cannot be read"),
    ):
        (folder / "adapter_config.json").write_text(text)
        with refused(part):
            load(base, additions=additions)
    (folder / "adapter_config.json").unlink()
    load(base, additions=additions)
    assert "no adapter_config.json beside it" in caplog.text
    (folder / "adapter_model.safetensors").unlink()
    with refused("a folder without adapter_model.safetensors or"):
        Additions.read([str(folder)], ())


def test_metadata_that_cannot_be_read_are_no_traceback(parts, tmp_path):
    """Nested too deeply, or a number that no float holds: an error for PEFT's settings, no words for kohya's."""
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 64), f"unet.{LAYER}.lora_B.weight": torch.ones(32, 2)}
    deep = "[" * 100_000
    for text in (deep, json.dumps({"unet.lora_alpha": 10**400})):
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with refused("a.safetensors: the settings of PEFT cannot be read: copy or download it again"):
            read_lora(tmp_path / "a.safetensors", parts, 1.0)
    assert trigger_words({"ss_tag_frequency": deep, "modelspec.trigger_phrase": "toy, mug"}) == ["toy", "mug"]


def test_tucker_matrices_are_read(base, tmp_path):
    """lora_mid: the change is the sum over both ranks."""
    layer = "down_blocks.0.resnets.0.conv1"
    weight = load(base).unet.get_submodule(layer).weight.detach()
    down, mid = torch.randn(2, weight.shape[1], 1, 1), torch.randn(3, 2, 3, 3)
    up = torch.randn(weight.shape[0], 3, 1, 1)
    name = kohya_name("unet", layer)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    models = load(base, additions=Additions(loras=((tmp_path / "a.safetensors", 1.0),)))
    expected = weight + 0.5 * torch.einsum("om,mnhw,ni->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    assert torch.allclose(models.unet.get_submodule(layer).weight, expected, atol=5e-6)


@pytest.mark.parametrize("spelling", [kohya, as_peft, without_text_model], ids=lambda f: f.__name__)
def test_layers_of_text_behind_the_last_one_in_use_are_left_out(base, run, tmp_path, caplog, spelling):
    """A base that is cut to its first layer takes the rest of a file for the whole one, and says what is left out."""
    whole = {name: tensor.clone() for name, tensor in spelling(adapters_of(run)[0]).items()}
    behind = [name for name in whole if "encoder.layers.1." in name or "encoder_layers_1_" in name]
    assert behind
    save_file(whole, tmp_path / "a.safetensors")
    save_file({name: whole[name] for name in whole.keys() - {*behind}}, tmp_path / "b.safetensors")
    cut = shutil.copytree(base, tmp_path / "cut")
    change_json(cut / "text_encoder/config.json", num_hidden_layers=1)
    found, expected = (
        weights(load(cut, additions=Additions.read([str(tmp_path / f"{name}.safetensors")], ()))) for name in "ab"
    )
    assert furthest(found, expected) == 0
    assert f"in use, which are left out: {len(behind)} tensors, " in caplog.messages[0]
    assert len(caplog.messages) == 1


def test_several_files_add_up_by_their_weights(base, run, tmp_path):
    """Weights 2, -1 and 0: the sum of the changes, to 5e-6."""
    adapters, _ = adapters_of(run)
    write_lora(tmp_path / "a.safetensors", adapters, "kohya", torch.float32, {})
    write_lora(tmp_path / "b.safetensors", adapters, "peft", torch.float32, {})
    names = [f"{tmp_path}/a.safetensors:2", f"{tmp_path}/b.safetensors:-1", f"{tmp_path}/b.safetensors:0"]
    models = load(base, additions=Additions.read(names, ()))
    assert furthest(weights(models), weights(load(run))) < 5e-6


def test_export_import_export_keeps_every_bit(base, run, tmp_path):
    """Tensors of the second file equal those of the first."""
    adapters, _ = adapters_of(run)
    write_lora(tmp_path / "a.safetensors", adapters, "kohya", torch.float32, {"ss_v2": "False"})
    again = read_lora(tmp_path / "a.safetensors", read_parts(base, None), 1.0)
    write_lora(tmp_path / "b.safetensors", again, "kohya", torch.float32, {"ss_v2": "False"})
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    texts = []
    for name in "ab":
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            texts.append(file.metadata())
    assert texts[0] == texts[1]


# --- Refusals -----------------------------------------------------------------------------------------------------

DOWN, UP = f"{kohya_name('unet', LAYER)}.lora_down.weight", f"{kohya_name('unet', LAYER)}.lora_up.weight"
ATTN1_DOWN, ATTN1_UP = (name.replace("attn2_to_k", "attn1_to_out_0") for name in (DOWN, UP))
ONES = torch.ones(3)
KINDS = {
    "a DoRA, which": {DOWN: torch.zeros(4, 64), f"{kohya_name('unet', LAYER)}.dora_scale": torch.zeros(1, 64)},
    "a LoRA for SDXL": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 1280)},
    "a LoRA for SDXL by its metadata": {ATTN1_DOWN: torch.zeros(4, 32), ATTN1_UP: torch.zeros(32, 4)},
    "has no up matrix": {DOWN: torch.zeros(4, 64)},
    "has no down matrix": {UP: torch.zeros(32, 4)},
    "LoRA for SDXL": {DOWN: torch.zeros(4, 2048), UP: torch.zeros(32, 4)},
    "LoRA for Stable Diffusion 1": {DOWN: torch.zeros(4, 768), UP: torch.zeros(32, 4)},
    "an output of 33": {DOWN: torch.zeros(4, 64), UP: torch.zeros(33, 4)},
    "strange, for which this model has no place: it is not a part of a LoRA": {"strange": torch.zeros(1)},
    "for which this model has no place: it is a LoRA for a model with other layers": {
        "lora_unet_mystery.alpha": ONES,
        DOWN: torch.zeros(4, 64),
    },
    "is a textual inversion embedding: name a model, and add the file with --embedding": {"emb_params": ONES[None]},
    "changes the bias": {f"{kohya_name('unet', LAYER)}.diff_b": torch.zeros(32)},
    "alpha of": {DOWN: torch.zeros(4, 64), UP: torch.zeros(32, 4), DOWN.replace("lora_down.weight", "alpha"): ONES},
    "are [] and [32, 4]": {DOWN: torch.zeros(()), UP: torch.zeros(32, 4)},
    "are [0, 64] and [32, 0]": {DOWN: torch.zeros(0, 64), UP: torch.zeros(32, 0)},
    "matrices of": {DOWN: torch.zeros(4, 64), UP: torch.zeros(32, 4), DOWN.replace("lora_down", "lora_mid"): ONES},
    "lora_down.weight holds values that are not finite": {DOWN: torch.full((4, 64), torch.inf).half()},
    "not weights: give a LoRA in": {DOWN: torch.zeros(4, 64, dtype=torch.int8)},
    "the difference of": {DOWN.replace("lora_down.weight", "diff"): torch.zeros(64, 32)},  # turned
    "to_k does not fit the model's": {DOWN.replace("lora_down.weight", "diff"): torch.zeros(2048)},
    "an input of 16 and an output of 32": {DOWN: torch.zeros(4, 16, 2, 2), UP: torch.zeros(32, 4)},
    "an input of 64 and an output of 8": {DOWN: torch.zeros(4, 64), UP: torch.zeros(8, 4, 2, 2)},
    "holds the down of": {DOWN: torch.zeros(4, 64), f"unet.{LAYER}.lora_A.weight": torch.zeros(4, 64)},
    "holds no LoRA": {"bundle_emb.toy.emb_params": torch.zeros(1, 64)},
}


def test_the_file_of_a_small_run_is_no_lora(base, run, capsys):
    """Its scale stands where no reader of LoRA files looks. The line says what to do, `bas info` too."""
    advice = "is a part of a small run: name the folder of the run as the model, or `bas export` it to a LoRA"
    with refused(str(run / TUNED), advice):
        load(base, additions=Additions.read([str(run / TUNED)], ()))
    assert advice in describe(run / TUNED)["problem"]


@pytest.mark.parametrize("part", KINDS)
def test_another_kind_is_named(base, tmp_path, part):
    """One line that says what the file is, or which tensor has no place: none is left out silently."""
    texts = {"ss_base_model_version": "sdxl_base_v1-0"} if "metadata" in part else {}
    save_file(KINDS[part], tmp_path / "a.safetensors", texts)
    with refused(part, "a.safetensors"):
        load(base, additions=Additions(loras=((tmp_path / "a.safetensors", 1.0),)))


FOREIGN = {  # names of tensors, by what `bas` calls the file
    "a LoHa": ["lora_unet_a.hada_w1_a"],
    "a LoKr": ["lora_unet_a.lokr_w1", "lora_unet_a.lokr_t2"],
    "a DoRA": ["unet.a.lora_magnitude_vector"],
    "a BOFT": ["base_model.model.a.boft_R"],
    "an OFT": ["lora_unet_a.oft_blocks", "lora_unet_a.oft_diag", "base_model.model.a.oft_R.weight"],
    "an IA3": ["lora_unet_a.on_input", "base_model.model.a.ia3_l"],
    "a GLoRA": ["lora_unet_a.b1.weight"],
    "a VeRA": ["base_model.model.a.vera_lambda_b"],
    "a LyCORIS with norms": ["lora_unet_a.w_norm"],
    "a ControlNet LoRA": ["lora_controlnet"],
    "a LoRA for Flux": [
        "lora_unet_double_blocks_0_img_attn_proj.alpha",
        "transformer.single_transformer_blocks.0.lora_A",
    ],
    "a LoRA for Stable Diffusion 3": ["lora_unet_joint_blocks_0_x.alpha"],
    "a LoRA for Stable Cascade": ["lora_prior_unet_down.alpha"],
    TRANSFORMER: ["transformer.transformer_blocks.0.a.lora_A.weight", "lora_te3_a.alpha", "lora_unet_blocks_0_a.alpha"],
    "a LoRA of cloneofsimo's scripts": ["unet:0:up"],
}


def test_every_foreign_kind_has_its_name(base, tmp_path, parts):
    """In the refusal, and in what `bas info` says."""
    for kind, names in FOREIGN.items():
        for name in names:
            save_file({name: torch.zeros(2, 2)}, tmp_path / "a.safetensors")
            with refused(f"a.safetensors is {kind}, which bas does not read"):
                read_lora(tmp_path / "a.safetensors", parts, 1.0)
            assert describe(tmp_path / "a.safetensors", hashes=False)["what"] == kind, name


def test_bundled_embeddings_are_named_and_left_out(base, run, tmp_path, caplog):
    adapters, _ = adapters_of(run)
    tensors = kohya(adapters) | {"bundle_emb.toy.emb_params": torch.zeros(1, 64)}
    save_file(tensors, tmp_path / "a.safetensors")
    load(base, additions=Additions(loras=((tmp_path / "a.safetensors", 1.0),)))
    assert "also holds the embeddings toy" in caplog.text


@pytest.mark.parametrize(("weight", "factors"), [(0.0, {}), (1.0, {"alpha": 0}), (1.0, {"up": 0}), (1.0, {"down": 0})])
def test_a_lora_that_changes_nothing_is_told(base, run, tmp_path, caplog, weight, factors):
    """Its weight, every alpha, or every matrix of one side is 0; half of them is no reason for a word."""
    path = tmp_path / "a.safetensors"
    tensors = kohya(adapters_of(run)[0])
    save_file(
        {name: t * next((f for part, f in factors.items() if part in name), 1) for name, t in tensors.items()}, path
    )
    models = load(base, additions=Additions(loras=((path, weight),)))
    assert furthest(weights(models), weights(load(base))) == 0
    assert caplog.messages == [f"--lora {path} changes nothing: its weight, its alpha or its matrices are 0"]
    caplog.clear()
    half = {name: t * (0 if "up" in name and "attn1" in name else 1) for name, t in tensors.items()}
    save_file(half, path)
    load(base, additions=Additions(loras=((path, 1.0),)))
    assert not caplog.messages


def test_a_lora_that_is_given_twice_is_told(base, run, tmp_path, caplog):
    """By another path, too; its weights add up."""
    write_lora(tmp_path / "a.safetensors", adapters_of(run)[0], "kohya", torch.float32, {})
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    additions = Additions.read([f"{tmp_path}/a.safetensors:0.25", f"{tmp_path}/link.safetensors:0.75"], ())
    assert caplog.messages == [f"--lora {(tmp_path / 'a.safetensors').resolve()} is given 2 times: its weights add up"]
    assert furthest(weights(load(base, additions=additions)), weights(load(run))) < 5e-6


def test_a_lora_beyond_all_numbers_is_named_and_not_the_model(base, run, tmp_path):
    tensors = {name: t * 1e30 for name, t in kohya(adapters_of(run)[0]).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with refused(f"{LAYER}.weight is finite alone, but not with the LoRA that is added: lower its weight"):
        load(base, additions=Additions(loras=((tmp_path / "a.safetensors", 1.0),)))


def test_weights_of_files(tmp_path):
    """FILE, FILE:WEIGHT, a file whose own name ends so; a wrong weight is refused."""
    assert split_weight("style.safetensors") == (split_weight("style.safetensors:1")[0], 1.0)
    assert split_weight("a/style.safetensors:0.8")[1] == 0.8
    assert split_weight("style.safetensors:-0.5")[1] == -0.5
    (tmp_path / "style:2").touch()
    assert split_weight(f"{tmp_path}/style:2") == (tmp_path / "style:2", 1.0)
    for text in ("style:strong", "style.safetensors:11", "style.safetensors:nan"):
        with refused("--lora style"):
            split_weight(text)


# --- Describing ---------------------------------------------------------------------------------------------------


def test_info_describes_the_files_of_an_export(base, run, tmp_path):
    """Base, layers, ranks, alpha and trigger words of a LoRA; handle and vectors of an embedding."""
    assert main(["export", str(run), str(tmp_path / "creature.safetensors")]) == 0
    told, texts = describe(tmp_path / "creature.safetensors"), adapters_of(run)[0]["text_encoder"]
    assert (told["what"], told["loads"]) == ("a LoRA", False)
    assert "add the file with --lora" in told["problem"]
    assert told["for"] == "a model with text of width 64"
    assert told["layers"] == f"{len(adapters_of(run)[0]['unet'])} of the UNet, {len(texts)} of the text encoder"
    assert (told["ranks"], told["alpha"]) == ([3, 4], [3.0])
    assert told["trigger words"] == ["asset0", "asset1"]
    assert told["base hash"] == weights_hash(base)
    assert told["not used"] == []
    told = describe(tmp_path / "asset0.safetensors")
    assert (told["handle"], told["learnt as"], told["vectors"]) == ("<asset0>", "<asset0>", [1])


def test_info_describes_foreign_files(tmp_path):
    """The family by the width of the text, a missing alpha, what has no place, and a kind that bas does not read."""
    names = (DOWN, UP, "lora_unet_mystery", f"bundle_emb.toy.{'emb_params'}")
    shapes = ((4, 1024), (32, 4), (1,), (1, 1024))
    save_file({n: torch.zeros(s) for n, s in zip(names, shapes, strict=True)}, tmp_path / "a.safetensors")
    told = describe(tmp_path / "a.safetensors")
    assert (told["for"], told["ranks"]) == ("Stable Diffusion 2", [4])
    assert told["alpha"] == "none: the strength counts as it is"
    assert told["not used"] == ["bundle_emb.toy.emb_params", "lora_unet_mystery"]
    plain = {ATTN1_DOWN: torch.zeros(4, 320, 1, 1), ATTN1_UP: torch.zeros(320, 4, 1, 1)}
    for texts, family in (
        ({"ss_v2": "True"}, "Stable Diffusion 2"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux-1-dev"),
        ({}, None),
    ):
        save_file(plain, tmp_path / "b.safetensors", texts)
        assert describe(tmp_path / "b.safetensors")["for"] == family


# --- Embeddings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shape", "count"),
    [
        ("emb_params", (1, 64), 1),
        ("emb_params", (3, 64), 3),
        ("emp_params", (1, 64), 1),
        ("<toy>", (64,), 1),
        ("clip_l", (2, 64), 2),
    ],
)
def test_embeddings_become_handles(base, tmp_path, key, shape, count):
    """Rows (n, d) are n tokens, the first called as the file, in every known layout, bit for bit."""
    rows = torch.randn(shape)
    save_file({key: rows}, tmp_path / "toy.safetensors")
    additions = Additions(embeddings=(tmp_path / "toy.safetensors",))
    assert read_spec(base, None, additions).handles == ("<toy>",)
    models = load(base, additions=additions)
    table = models.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[-count:], rows.reshape(-1, 64))
    added = models.tokenizer.get_added_vocab()
    assert [added[name] for name in ("<toy>", "<toy>_1", "<toy>_2")[:count]] == [*range(len(table) - count, len(table))]


@pytest.mark.parametrize(
    ("name", "tensors", "part"),
    [
        ("toy", {"emb_params": torch.zeros(1, 1024)}, "is for Stable Diffusion 2"),
        ("toy", {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "for SDXL"),
        ("toy", {"<a>": torch.zeros(1, 64), "<b>": torch.zeros(1, 64)}, "holds 2 tensors"),
        (
            "my toy",
            {"emb_params": torch.zeros(1, 64)},
            "becomes the handle: rename it to 1 to 32 letters a-z or A-Z, digits, _ or -",
        ),
        ("toy", {"emb_params": torch.zeros(2, 3, 64)}, "is not an embedding"),
        ("toy", {"emb_params": torch.zeros(76, 64)}, "has 76 vectors: a prompt has places for 75"),
        (
            "toy",
            {"emb_params": torch.full((1, 64), torch.nan)},
            "toy.safetensors: emb_params holds values that are not",
        ),
        (
            "toy",
            {"emb_params": torch.full((1, 64), 1e300, dtype=torch.double)},
            "not finite numbers: download it again",
        ),
        ("toy", {"step": torch.tensor(100)}, "holds 0 tensors"),
        ("toy", {DOWN: torch.zeros(4, 64), UP: torch.zeros(32, 4)}, "is a LoRA: it holds changes to a model"),
    ],
)
def test_what_is_no_embedding_of_this_model_is_refused(base, tmp_path, name, tensors, part):
    save_file(tensors, tmp_path / f"{name}.safetensors")
    with refused(part):
        read_spec(base, None, Additions(embeddings=(tmp_path / f"{name}.safetensors",)))


def test_numbers_beside_an_embedding_are_no_vectors(base, tmp_path):
    """A1111 writes how long it was trained."""
    path, rows = tmp_path / "toy.safetensors", torch.ones(2, 64)
    save_file({"emb_params": rows, "step": torch.tensor(500)}, path)
    assert torch.equal(read_embedding(path, {"text_encoder": 64})[1]["text_encoder"], rows)
    assert describe(path)["vectors"] == [2]


def test_a_file_that_is_missing_is_said_to_be_missing(base, tmp_path):
    path = tmp_path / "a.safetensors"
    for additions in (Additions(loras=((path, 1.0),)), Additions(embeddings=(path,))):
        with refused(f"{path} does not exist"):
            load(base, additions=additions)


def test_sample_takes_both(base, run, tmp_path, monkeypatch):
    """`bas sample MODEL --lora FILE:WEIGHT --embedding FILE` writes an image; the exported files of a run are both."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "creature.safetensors"]) == 0
    words = ["sample", str(base), "--lora", "creature.safetensors:1", "--embedding", "asset0.safetensors"]
    flags = ["--num_inference_steps", "1", "--height", "64", "--width", "64", "--precision", "fp32"]
    assert main([*words, "--prompt", "a photo of <asset0>", *flags]) == 0
    assert (tmp_path / "result.png").exists()
    assert main([*words[:2], "--prompt", "a photo of <asset0>", *flags]) == 2


@pytest.mark.parametrize(
    ("prompt", "negative", "told"),
    [("a photo", "ugly", True), ("a photo of <ugly>", "", False), ("a photo", "(<ugly>:2)", False)],
)
def test_an_embedding_that_no_prompt_names_is_told(base, tmp_path, monkeypatch, caplog, prompt, negative, told):
    """The negative prompt counts, and each of several prompts."""
    monkeypatch.chdir(tmp_path)
    save_file({"emb_params": torch.ones(1, 64)}, "ugly.safetensors")
    words = ["sample", str(base), "--embedding", "ugly.safetensors", "--prompt", "a bowl", prompt]
    flags = ["--negative_prompt", negative, "--num_inference_steps", "1", "--height", "64", "--width", "64"]
    assert main([*words, *flags]) == 0
    line = "--embedding ugly.safetensors has no effect: no prompt names <ugly>, with < >"
    assert (line in caplog.messages) is told
