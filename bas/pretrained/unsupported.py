"""Models that bas does not support, recognised by names and shapes; the error says what they are and what to do."""

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from bas.errors import InputError
from bas.io.json_files import read_json, read_text

LORA, EMBEDDING = "a LoRA", "a textual inversion embedding"
WHOLE_MODEL = "give a whole Stable Diffusion 1.x, 2.x or XL model"
COSXL = "a CosXL model, of another noise schedule (EDM)"
PLAYGROUND = "a Playground 2.5 model, of another noise schedule (EDM)"

KINDS = (  # a pattern that one of the file's keys matches, what the file then is, what to do
    (
        r"(^|[._])lora[._]|\.hada_w|\.lokr_|oft_(blocks|diag|R|s$)|\.ia3_l|vera_lambda|^(unet|text_encoder):\d+:",
        LORA,
        "it holds changes to a model: name the model, and add the file with --lora",
    ),
    (r"joint_blocks\.", "a Stable Diffusion 3 model", WHOLE_MODEL),
    (r"double_blocks\.|single_transformer_blocks\.", "a Flux model", WHOLE_MODEL),
    (r"^control_model\.|controlnet_|input_hint_block\.", "a ControlNet", WHOLE_MODEL),
    (
        r"^(string_to_param|em[bp]_params|clip_[gl]$)|^<[^<>]*>$",
        EMBEDDING,
        "name a model, and add the file with --embedding",
    ),
    (r"motion_modules\.", "an AnimateDiff motion module", WHOLE_MODEL),
    (r"^edm_vpred\.", COSXL, WHOLE_MODEL),
    (r"^edm_(mean|std)", PLAYGROUND, WHOLE_MODEL),
)
ALONE = (  # for files that hold no UNet in the original layout
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid)", "a VAE alone"),
    (r"^(down_blocks|mid_block|up_blocks|input_blocks|output_blocks)\.", "a UNet alone"),
    (r"(^|\.)(text_model|embeddings|resblocks|token_embedding)\.", "a text encoder alone"),
)
# Class names of a model_index.json whose networks are those of Stable Diffusion, and what else may stand there.
SUPPORTED = {
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipelineLegacy"),
    *("StableDiffusionAttendAndExcitePipeline", "StableDiffusionSAGPipeline", "StableDiffusionPanoramaPipeline"),
    *("StableDiffusionPipelineSafe", "StableDiffusionPAGPipeline", "CycleDiffusionPipeline"),
    *("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
    *(
        "StableDiffusionXLPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionKDiffusionPipeline",
        "StableDiffusionDiffEditPipeline",
    ),
}
PIPELINES = (  # how the class name begins, what the model is
    ("StableDiffusionXLControlNet", "a ControlNet pipeline of Stable Diffusion XL"),
    ("StableDiffusionXLAdapter", "an adapter pipeline of Stable Diffusion XL"),
    ("StableDiffusionXLImg2Img", "a Stable Diffusion XL refiner"),
    ("StableDiffusionXLInpaint", "an inpainting model"),
    ("StableDiffusionXLInstructPix2Pix", "an InstructPix2Pix model"),
    ("StableDiffusionXL", "a pipeline of Stable Diffusion XL that bas does not know"),
    ("StableDiffusion3", "a Stable Diffusion 3 model"),
    ("Flux", "a Flux model"),
    ("StableDiffusionInpaint", "an inpainting model"),
    ("StableDiffusionDepth2Img", "a depth model"),
    ("StableDiffusionUpscale", "an upscaler"),
    ("StableDiffusionInstructPix2Pix", "an InstructPix2Pix model"),
)
CLASSES = {  # the classes of each part of a model; SDXL's second text encoder and its tokenizer are in its index alone
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
SECOND = ("text_encoder_2", "tokenizer_2")  # of SDXL alone
BASE_ADVICE = "use the base model it was made from"
LEAST_VOCABULARY, MOST_LOST = 1000, 0.02  # words of a vocabulary that is checked; the share that may lack a merge
WITHOUT_MERGE = 2 * 256 + 2  # words of CLIP's vocabulary: bytes, within a word and at its end; start and end of text
ELSEWHERE = {  # of a tokenizer_config.json: arguments by which transformers would read files outside the folder
    *("gguf_file", "init_inputs", "merges", "tokenizer_object", "vocab"),
}


def check_kind(names: Iterable[str], path: Path) -> None:
    """Raise InputError when the keys of a file, or the files of a folder, are those of another kind of model."""
    if kind := other_kind(names):
        raise InputError(f"{path} is {kind[0]}: {kind[1]}")


def other_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """Return which other kind of model the keys of a file, or the files of a folder, belong to, and what to do."""
    names = list(names)
    for pattern, what, advice in KINDS:
        if any(re.search(pattern, name) for name in names):
            return what, advice
    return None


def check_complete(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise InputError unless a single file holds UNet, VAE and text encoder in the original layout."""
    if not tensors:
        raise InputError(f"{path} holds no tensors: {WHOLE_MODEL}")
    check_kind(tensors, path)
    if not any(name.startswith("model.diffusion_model.") for name in tensors):
        for pattern, what in ALONE:
            if any(re.search(pattern, name) for name in tensors):
                raise InputError(f"{path} is {what}: {WHOLE_MODEL}")
        raise InputError(f"{path} is not a Stable Diffusion model (its first key is {min(tensors)!r}): {WHOLE_MODEL}")
    for prefix, what in (("first_stage_model.", "VAE"), ("cond_stage_model.", "text encoder")):
        if not any(name.startswith(prefix) for name in tensors):
            raise InputError(f"{path} holds no {what}: use the full file, not one without it")


def check_channels(channels: object, latents: object, path: Path) -> None:
    """Raise InputError when the UNet reads more than the VAE's latents. channels, latents: of their configurations

    The number beyond the latents tells the kind: a depth map, a small image, an image's latents, those and a mask.
    """
    if not isinstance(channels, int) or not isinstance(latents, int):
        return  # for the check of the configuration
    kinds = {1: "a depth model", 3: "an upscaler", latents: "an InstructPix2Pix model"}
    kinds[latents + 1] = "an inpainting model"
    if kind := kinds.get(channels - latents):
        raise InputError(f"{path} is {kind} ({channels} input channels): {BASE_ADVICE}")


def check_edm(scheduler: object, vae: dict, path: Path) -> None:
    """Raise InputError when a folder's scheduler is one of EDM. vae: its config.json

    Playground's latents have a mean and a deviation of their own, CosXL's have not.
    """
    if isinstance(scheduler, str) and scheduler.startswith("EDM"):
        what = PLAYGROUND if vae.get("latents_mean") else COSXL
        raise InputError(f"{path} is {what}, scheduler _class_name is {scheduler!r}: {WHOLE_MODEL}")


def check_pipeline(index: dict, path: Path) -> None:
    """Raise InputError when a model_index.json describes anything but Stable Diffusion 1.x, 2.x or XL."""
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise InputError(f"{path} has {name!r} as its _class_name: {WHOLE_MODEL}")
    if name not in SUPPORTED:
        what = next((what for beginning, what in PIPELINES if name.startswith(beginning)), "a model of another kind")
        raise InputError(f"{path} is {what} ({name}): {WHOLE_MODEL}")
    for part in (part for part in CLASSES if "XL" in name or part not in SECOND):
        entry = index.get(part)
        check_class(part, entry[1] if isinstance(entry, list) and len(entry) == 2 else entry, path)


def check_class(part: str, name: object, path: Path) -> None:
    """Raise InputError unless this is a class of a part of the model."""
    if name not in CLASSES[part]:
        raise InputError(f"{path} has {name!r} as its {part}, bas needs {CLASSES[part][0]}: {WHOLE_MODEL}")


def check_tokenizer_config(config: dict, path: Path) -> None:
    """Raise InputError when a tokenizer_config.json names files elsewhere, pads before the words, or has a length that
    no prompt can have."""
    if found := ELSEWHERE & config.keys():
        raise InputError(f"{path} sets {min(found)}: bas reads a tokenizer from its own folder alone")
    if config.get("padding_side", "right") != "right":
        raise InputError(
            f"{path}: padding_side is {config['padding_side']!r}: bas needs a tokenizer that pads at the end"
        )
    length = config.get("model_max_length")
    if length is not None and (not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 3):
        raise InputError(f"{path}: model_max_length is {length!r}, expected a number from 3")


def check_merges(folder: Path) -> None:
    """Raise InputError when a tokenizer has far fewer merges than its vocabulary has words that need one.

    A merges.txt that was cut off loads, and then other tokens stand for most words. A small vocabulary is not looked
    at: those of test models name words that no merge leads to.
    """
    if (folder / "merges.txt").is_file() and (folder / "vocab.json").is_file():
        path, vocabulary = folder / "merges.txt", read_json(folder / "vocab.json")
        merges: object = [line for line in read_text(path).splitlines() if not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        model = read_json(path).get("model")
        vocabulary, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    else:
        return
    if not isinstance(vocabulary, dict) or not isinstance(merges, list) or len(vocabulary) < LEAST_VOCABULARY:
        return
    if len(vocabulary) - WITHOUT_MERGE - len(merges) > MOST_LOST * len(vocabulary):
        raise InputError(
            f"{path} holds {len(merges)} merges, too few for the {len(vocabulary)} words of the vocabulary: it is cut "
            "off, or of another model; copy or download it again"
        )
