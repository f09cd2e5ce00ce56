"""A setting of a training that is given and changes nothing is named, with the reason."""

import pytest
import torch

from bas.cli.entry import main
from bas.config import TrainConfig, setting_rows
from bas.training.unused_settings import USED, without_effect

CLASS_IMAGES = "this training takes no class images"
FROZEN = "--train kv, v and token leave the text encoder frozen"
PHASE1, PHASE2 = (f"--phase{i}_train_steps 0 leaves out phase {i}" for i in (1, 2))


@pytest.mark.parametrize(
    ("given", "names", "reason"),
    [
        (
            {"with_prior_preservation": False, "num_class_images": 5, "class_prompt": ("a bowl",)},
            ["num_class_images", "class_prompt"],
            CLASS_IMAGES,
        ),
        ({"method": "ti", "prior_loss_weight": 0.5}, ["prior_loss_weight"], CLASS_IMAGES),
        ({"phase1_train_steps": 0, "initial_learning_rate": 1.0}, ["initial_learning_rate"], PHASE1),
        ({"phase1_train_steps": 0, "exact_phase1": True}, ["exact_phase1"], PHASE1),
        ({"phase2_train_steps": 0, "learning_rate": 1.0, "train": "kv"}, ["learning_rate", "train"], PHASE2),
        (
            {"lambda_attention": 0.0, "attention_loss": "cross_entropy"},
            ["attention_loss"],
            "--lambda_attention 0 turns off the attention loss",
        ),
        (
            {"lambda_attention": 0.0, "img_log_steps": 0, "attention_grid": 8},
            ["attention_grid"],
            "--lambda_attention 0 and --img_log_steps 0 leave no map that is read",
        ),
        *(
            ({"method": method, "close_ups": True}, ["close_ups"], "--method ti and db see the whole image alone")
            for method in ("ti", "db")
        ),
        (
            {"phase2_train_steps": 0, "train": "lora", "rank": 4, "alpha": 2.0, "conv_rank": 2, "lora_targets": "kv"},
            ["train", "rank", "alpha", "lora_targets", "conv_rank"],
            PHASE2,
        ),
        (
            {"apply_masked_loss": False, "normalize_masked_loss": True},
            ["normalize_masked_loss"],
            "the loss is taken without masks",
        ),
        (
            {"seg_mix_move": 0.5, "seg_mix_cells": True},
            ["seg_mix_move", "seg_mix_cells"],
            "--seg_mix_probability 0 turns off Seg-Mix",
        ),
        ({"method": "ti", "collection_size": 3}, ["collection_size"], "only a -m method learns from a collection"),
        (
            {"lr_scheduler": "cosine", "lr_num_cycles": 3},
            ["lr_num_cycles"],
            "only --lr_scheduler cosine_with_restarts uses it",
        ),
        *(
            ({"train": kind, "train_text_encoder": False}, ["train_text_encoder"], FROZEN)
            for kind in ("kv", "v", "token")
        ),
        (
            {"method": "cd-m", "train_text_encoder": False},
            ["train_text_encoder"],
            "this --method trains no text encoder",
        ),
        (
            {"method": "ti-m", "learning_rate": 1.0},
            ["learning_rate"],
            "this --method trains at --initial_learning_rate",
        ),
        (
            {"method": "db", "initial_learning_rate": 1.0},
            ["initial_learning_rate"],
            "this --method trains at --learning_rate",
        ),
        ({"lr_power": 2.0}, ["lr_power"], "only --lr_scheduler polynomial uses it"),
        (
            {"checkpointing_steps": 0, "checkpoints_total_limit": 3},
            ["checkpoints_total_limit"],
            "--checkpointing_steps 0 writes no checkpoint",
        ),
        (
            {"img_log_steps": 0, "preview_inference_steps": 3},
            ["preview_inference_steps"],
            "--img_log_steps 0 draws no preview",
        ),
        (
            {"device": "cpu", "allow_tf32": True, "deterministic": True},
            ["allow_tf32", "deterministic"],
            "it is for a GPU, and the device is the CPU",
        ),
        # Settings that count, and those that are as they would be anyway.
        (
            {"num_class_images": 5, "seg_mix_probability": 0.5, "seg_mix_move": 0.5, "checkpoints_total_limit": 3},
            [],
            "",
        ),
        ({"method": "ti-m", "collection_size": 3, "phase1_train_steps": 0, "initial_learning_rate": 1.0}, [], ""),
        ({"train": "lora", "train_text_encoder": False}, [], ""),
        ({"lambda_attention": 0.0, "attention_grid": 8}, [], ""),
        ({"method": "ti-m", "close_ups": True}, [], ""),
        ({"phase1_train_steps": 0, "train": "lora", "rank": 4}, [], ""),
        ({"method": "db-m", "learning_rate": 1.0, "train": "kv"}, [], ""),
        ({"device": "cuda:0", "allow_tf32": True, "deterministic": True}, [], ""),
        ({"with_prior_preservation": False, "num_class_images": 100, "lr_num_cycles": 1}, [], ""),
    ],
)
def test_what_changes_nothing_is_named(given, names, reason):
    config = TrainConfig.resolve({"instance_data_dir": "scene", **given})
    usual = TrainConfig.resolve({"instance_data_dir": "scene"})
    assert without_effect(config, usual, given) == [f"--{name} has no effect: {reason}" for name in names]


@pytest.mark.parametrize("gpu", [False, True])
def test_without_a_name_the_device_is_a_gpu_if_there_is_one(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = TrainConfig.resolve({"instance_data_dir": "scene", "deterministic": True})
    told = without_effect(config, TrainConfig(), ["deterministic"])
    assert told == ([] if gpu else ["--deterministic has no effect: it is for a GPU, and the device is the CPU"])


def test_the_table_names_settings():
    assert {name for names, _, _ in USED for name in names} <= setting_rows(TrainConfig).keys()


def test_the_command_says_it_once(bench, caplog):
    words = ["train", str(bench.scene), "--weights", str(bench.model), "--no_prior_preservation", "--dry_run"]
    assert main([*words, "--num_class_images", "3"]) == 0
    told = [line for line in caplog.messages if "no effect" in line]
    assert told == [f"--num_class_images has no effect: {CLASS_IMAGES}"]
