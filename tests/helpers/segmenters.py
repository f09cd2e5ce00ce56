"""Tiny random segmentation models, as folders that transformers writes: SAM and CLIPSeg."""

from pathlib import Path

import transformers as hf

from tests.helpers.tiny import tokenizer


def write_sam(folder: Path) -> Path:
    """Write a SAM whose grid has 8x8 cells. Returns its folder."""
    config = hf.SamConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "output_channels": 32,
            "image_size": 64,
            "patch_size": 8,
            "global_attn_indexes": [0],
            "num_pos_feats": 16,
            "mlp_dim": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_depth": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    side = {"height": 64, "width": 64}
    images = hf.SamImageProcessorPil(size={"longest_edge": 64}, pad_size=side, mask_size={"longest_edge": 16})
    hf.SamModel(config).save_pretrained(folder)
    hf.SamProcessor(images).save_pretrained(folder)
    return folder


def write_clipseg(folder: Path) -> Path:
    """Write a CLIPSeg that reads images of 32x32 pixels. Returns its folder."""
    words = tokenizer(folder / "words")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.CLIPSegConfig(
        text_config={**tower, "vocab_size": len(words), "eos_token_id": words.eos_token_id},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    hf.CLIPSegForImageSegmentation(config).save_pretrained(folder)
    hf.CLIPSegProcessor(hf.ViTImageProcessorPil(size={"height": 32, "width": 32}), words).save_pretrained(folder)
    return folder
