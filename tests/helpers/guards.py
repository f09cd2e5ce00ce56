"""Guards of bas, one a row: how each is taken out, and the test that must fail without it (mutations.py tries it)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """One guard, how to take it out, and the test that must then fail."""

    what: str
    file: str  # in bas
    text: str  # stands there once
    instead: str
    test: str  # in tests


GUARDS = (
    # A run that is cut off
    Guard(
        "a cut-off checkpoint does not count",
        "training/checkpoints.py",
        "if (path / MANIFEST).is_file()]",
        "]",
        "scenarios/test_resume.py::test_only_whole_checkpoints_are_listed",
    ),
    Guard(
        "a checkpoint is compared with its manifest",
        "training/checkpoints.py",
        "or describe_file(folder / name) != expected",
        "",
        "scenarios/test_resume.py::test_damaged_checkpoint_is_refused",
    ),
    Guard(
        "the random generator goes on where it was",
        "training/setup.py",
        'generator.set_state(checkpoint.tensors["generator"])',
        "pass",
        "scenarios/test_resume.py::test_resumed_run_equals_an_uninterrupted_one",
    ),
    Guard(
        "the optimizer goes on where it was",
        "training/phase_state.py",
        "        restore_optimizer(state.optimizer, checkpoint.tensors)\n",
        "",
        "scenarios/test_resume.py::test_resumed_run_equals_an_uninterrupted_one",
    ),
    Guard(
        "the loss scale of fp16 goes on where it was",
        "training/phase_state.py",
        "        state.scaler.load_state_dict(checkpoint.scaler)\n",
        "",
        "scenarios/test_numbers.py::test_the_loss_scale_of_fp16_is_resumed",
    ),
    Guard(
        "metrics are cut back to the checkpoint",
        "training/metrics.py",
        "file.truncate(min(length, path.stat().st_size))",
        "pass",
        "scenarios/test_resume.py::test_steps_since_the_checkpoint_are_done_again",
    ),
    Guard(
        "other settings are refused on resume",
        "training/resume.py",
        "differs = [FLAGS[name] for name in ours if name not in free and _plain(ours[name]) != _plain(theirs[name])]",
        "differs = []",
        "scenarios/test_resume.py::test_other_settings_handles_or_weights_are_refused_by_name",
    ),
    # Disk and folder
    Guard(
        "a file is synced before it takes its place",
        "io/files.py",
        "        sync(temporary)\n",
        "",
        "scenarios/test_survival.py::test_a_file_is_on_the_disk_before_it_takes_its_place",
    ),
    Guard(
        "a written file is opened again on the disk",
        "io/files.py",
        'with safe_open(temporary, framework="pt"):',
        "if True:",
        "scenarios/test_survival.py::test_a_write_that_claims_success_is_looked_at_on_the_disk",
    ),
    Guard(
        "a half-written file is removed",
        "io/files.py",
        "temporary.unlink(missing_ok=True)",
        "pass",
        "pretrained/test_folder.py::test_a_failed_save_leaves_the_old_file_and_no_other",
    ),
    Guard(
        "a full disk gets its room back",
        "training/checkpoints.py",
        "    except OSError:\n        remove_checkpoint(temporary)",
        "    except OSError:\n        pass",
        "scenarios/test_survival.py::test_a_full_disk_keeps_the_old_checkpoint",
    ),
    Guard(
        "too small a disk is told beforehand",
        "training/disk_space.py",
        "if sum(files.values()) > free:",
        "if False:",
        "training/test_dry_run.py::test_a_disk_without_room_is_refused_before_weights_are_read",
    ),
    Guard(
        "a read-only folder is told beforehand",
        "training/disk_space.py",
        "if not os.access(existing, os.W_OK):",
        "if False:",
        "scenarios/test_survival.py::test_a_read_only_folder_is_refused",
    ),
    Guard(
        "one run a folder",
        "training/run_folder.py",
        "lock.acquire(blocking=False)",
        "pass",
        "scenarios/test_survival.py::test_the_second_of_two_runs_is_refused_and_the_first_goes_on",
    ),
    Guard(
        "a finished run is not written over",
        "training/run_folder.py",
        "if (folder / CONCEPTS).exists():",
        "if False:",
        "training/test_setup.py::test_run_folder_must_be_free",
    ),
    Guard(
        "a folder with other files is left alone",
        "training/run_folder.py",
        "if SETTINGS not in names:",
        "if False:",
        "scenarios/test_early.py::test_wrong_input_is_found_before_weights_are_read",
    ),
    # Signals and readers
    Guard(
        "a signal saves and ends",
        "training/loop.py",
        "config, signal, resumed = run.config, run.interrupts.asked",
        "config, signal, resumed = run.config, None",
        "scenarios/test_stop.py::test_the_command_ends_with_the_code_that_shells_expect",
    ),
    Guard(
        "a second signal ends at once",
        "runtime/signals.py",
        "            signal.signal(each, signal.SIG_DFL)",
        "            pass",
        "scenarios/test_stop.py::test_a_second_signal_ends_the_process_at_once_and_harms_nothing",
    ),
    Guard(
        "a terminal may go",
        "runtime/progress.py",
        "with suppress(OSError):",
        "with suppress(BrokenPipeError):",
        "scenarios/test_stop.py::test_a_lost_terminal_saves_and_ends",
    ),
    Guard(
        "a closed pipe is seen before Python ends",
        "cli/entry.py",
        "            stream.flush()",
        "            pass",
        "scenarios/test_stop.py::test_a_closed_pipe_ends_a_command_quietly",
    ),
    # Numbers and memory
    Guard(
        "a loss that is not finite stops the run",
        "training/nonfinite.py",
        "        if not is_finite(row, run.precision):\n            wrong",
        "        if False:\n            wrong",
        "scenarios/test_numbers.py::test_a_number_that_is_not_finite_stops_the_run_within_its_step",
    ),
    Guard(
        "weights that are not finite are not saved",
        "training/loop.py",
        '    check_weights(run, state.weights.optimized, f"after step {step}")\n',
        "",
        "scenarios/test_numbers.py::test_a_number_that_is_not_finite_stops_the_run_within_its_step",
    ),
    Guard(
        "fp16 may not overflow for ever",
        "training/nonfinite.py",
        "if run.overflows == OVERFLOWS:",
        "if False:",
        "scenarios/test_numbers.py::test_fp16_that_always_overflows_stops",
    ),
    Guard(
        "a map that is 0 everywhere is divided by no 0",
        "losses.py",
        "amax(dim=(-2, -1), keepdim=True).clamp(min=ATTENTION_FLOOR)",
        "amax(dim=(-2, -1), keepdim=True)",
        "test_losses.py::test_a_dead_map_is_finite",
    ),
    Guard(
        "deterministic mode reaches PyTorch",
        "runtime/device.py",
        "    torch.use_deterministic_algorithms(True)\n",
        "",
        "scenarios/test_numbers.py::test_deterministic_mode_holds_while_the_run_lasts",
    ),
    Guard(
        "out of memory is answered with advice",
        "cli/commands/train.py",
        "if not is_out_of_memory(error):",
        "if True:",
        "training/test_dry_run.py::test_out_of_memory_is_answered_with_what_each_flag_saves",
    ),
    # Models
    Guard(
        "a header names each tensor once",
        "io/files.py",
        "if len(entries) < len(pairs):",
        "if False:",
        "scenarios/test_bad_models.py::test_a_damaged_header_is_refused_with_its_reason",
    ),
    Guard(
        "a header has an end",
        "io/files.py",
        "if length > MAX_JSON_BYTES:",
        "if False:",
        "scenarios/test_bad_models.py::test_a_large_header_is_not_even_read",
    ),
    Guard(
        "a pickle is named as one",
        "io/files.py",
        "    for beginning, what, advice in FOREIGN:",
        "    for beginning, what, advice in ():",
        "pretrained/test_unsupported.py::test_pickles_are_refused_unopened",
    ),
    Guard(
        "shards lie beside their index",
        "pretrained/folder.py",
        r'not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors", name)',
        'not name.endswith("safetensors")',
        "pretrained/test_unsupported.py::test_shards_stay_in_the_folder",
    ),
    Guard(
        "a tokenizer reads its own folder alone",
        "pretrained/unsupported.py",
        "if found := ELSEWHERE & config.keys():",
        "if found := ():",
        "scenarios/test_bad_models.py::test_absurd_settings_are_refused_before_anything_is_allocated",
    ),
    Guard(
        "weights are finite",
        "pretrained/loading.py",
        "dtype=dtype) if _is_finite(tensor) else None",
        "dtype=dtype)",
        "pretrained/test_folder.py::test_unusable_weights_are_refused",
    ),
    Guard(
        "weights are all there and no more",
        "pretrained/loading.py",
        '    _refuse(problems, source, "does not hold',
        '    _refuse([], source, "does not hold',
        "pretrained/test_folder.py::test_all_wrong_keys_are_listed_in_one_error",
    ),
    Guard(
        "an inpainting model is refused by name",
        "pretrained/unsupported.py",
        "if isinstance(channels, int) and channels in CHANNELS:",
        "if False:",
        "pretrained/test_unsupported.py::test_models_with_further_inputs_are_refused_by_name",
    ),
    # Pictures and masks
    Guard(
        "a header bomb is not decoded",
        "io/images.py",
        "if picture.width * picture.height > MAX_PIXELS:",
        "if False:",
        "scenarios/test_bad_images.py::test_a_header_bomb_is_refused_before_it_is_decoded",
    ),
    Guard(
        "five formats alone",
        "io/images.py",
        "Image.open(path, formats=FORMATS)",
        "Image.open(path)",
        "scenarios/test_bad_images.py::test_other_formats_are_refused_under_any_name",
    ),
    Guard(
        "a camera's note turns the picture",
        "io/images.py",
        "return ImageOps.exif_transpose(picture)",
        "return picture",
        "data/test_scene.py::test_photograph_is_turned_upright",
    ),
    Guard(
        "colour and alpha that both vary ask",
        "io/images.py",
        "if alpha_varies and colour_varies:",
        "if False:",
        "data/test_scene.py::test_mask_with_colour_and_alpha_is_ambiguous",
    ),
    Guard(
        "a mask has the picture's shape",
        "data/scene.py",
        "if not _alike(w / h, image_w / image_h):",
        "if False:",
        "data/test_scene.py::test_mask_of_another_shape_is_refused",
    ),
    Guard(
        "two concepts have two masks",
        "data/scene.py",
        "if np.array_equal(mask, earlier):",
        "if False:",
        "data/test_scene.py::test_two_concepts_need_two_masks",
    ),
    # Words
    Guard(
        "a handle is never cut off",
        "models/text.py",
        "if set(cut) & set(tokenizer.convert_tokens_to_ids(list(known))):",
        "if False:",
        "models/test_text.py::test_a_handle_that_would_be_cut_off_is_an_error",
    ),
    Guard(
        "a handle takes no token of the model",
        "models/text.py",
        "        if handle in vocabulary:",
        "        if False:",
        "models/test_text.py::test_a_handle_cannot_take_a_token_of_the_vocabulary",
    ),
)
