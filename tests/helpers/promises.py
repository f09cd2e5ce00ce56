"""The promises of docs/robustness.md and the tests of each: `pytest --promises` ends with the table of what held."""

import re
from collections import Counter

PROMISES = (  # what is promised, and a pattern that the names of its tests match, as file::test
    (
        "a killed run, resumed, ends with the bits of an uninterrupted one (eight kills; kills.py tries seventy)",
        r"test_kills",
    ),
    (
        "a run killed while it writes a file resumes at once (three runs; random_kills.py tries sixty)",
        r"test_random_kills",
    ),
    (
        "if a run is killed after its last step, the same command completes it",
        r"training/test_resume::.*(made_good|gets_one|prevented)|left_in_a_finished_run",
    ),
    (
        "a small run is rejected unless its files are whole, of its kind and of sound types",
        r"pretrained/test_small_runs",
    ),
    (
        "a resumed run must have the same settings and files, except settings that do not change the result",
        r"scenarios/test_resume|the_loss_scale_of|counted_on_after_a_resume",
    ),
    (
        "a checkpoint or metrics that do not fit the run are rejected before weights are read; errors name both values",
        r"training/test_(checkpoints|resume)::.*(damaged|other_parameters|do_not_reach|beyond_the_run|another_run|were_cut)",
    ),
    (
        "a save is complete or absent",
        r"training/test_checkpoints::.*(round_trip|the_bit|same_step|order|just_written|being_removed)"
        r"|training/test_metrics|io/test_run_files|pretrained/test_folder::.*(mapped_files|failed_save|index_is)|on_the_disk|claims_success",
    ),
    (
        "the studio answers only its own page: any other host, origin, token, type, size or name is refused",
        r"studio/test_guard",
    ),
    (
        "the studio saves masks as they were painted, and a wrong mask, name or photograph leaves nothing",
        r"studio/test_scenes",
    ),
    (
        "the folder of a studio job says whether it runs, stopped or was lost; continued, it gives the same bits",
        r"studio/test_jobs",
    ),
    (
        "nothing in a studio folder from elsewhere starts by itself, and the queue runs in the order shown",
        r"studio/test_queue",
    ),
    ("a signal finishes the step, saves and ends with its code", r"test_stop::.*(signal|shells_expect|terminal_saves)"),
    (
        "if the program that reads the output has ended: one exit code, no traceback",
        r"test_stop::.*(pipe|full_disk|nobody_reads|cannot_be_written)",
    ),
    (
        "closed streams, other encodings and control characters in names change neither the work nor its output",
        r"test_entry::.*(closed_streams|encoding_lacks|control_characters)|forge_a_line|one_printable_line",
    ),
    (
        "a `bas.json` sets only training and guidance; an error in bas is not reported as a damaged file",
        r"model_sets_only|settings_of_the_miniature|mistake_of_bas|library_raises",
    ),
    (
        "a folder that bas did not write is rejected and stays as it is; in a run bas removes only files that it wrote",
        r"test_run_folder::.*(did_not_write|refuses_it|is_foreign|only_what_bas|behind_a_link)|scene_is_no_folder",
    ),
    (
        "one run per folder, and none of its files is overwritten",
        r"second_of_two|racing|must_be_free|only_leftovers",
    ),
    (
        "a full or read-only disk loses nothing, and is reported before weights are read",
        r"test_survival::.*(full_disk|disk_that|read_only|sees_it)|test_dry_run::.*disk",
    ),
    (
        "out of memory: the error gives advice with numbers, and the checkpoint is kept",
        r"memory_is|savings|without_memory|memory_keeps",
    ),
    (
        "a number that is not finite stops the run in that step, and the error names it",
        r"test_numbers::.*(not_finite|went_wrong|bad_step)|dead_map|dead_padding",
    ),
    (
        "an image with numbers that are not finite is decoded again in float32, or the command ends with 1",
        r"test_sampler::.*(overflow|not_finite|black_image|broken_in)|test_blended_diffusion::.*(overflow|not_finite)",
    ),
    ("a step that overflows in fp16 changes no weight and is counted", r"test_numbers::.*fp16"),
    (
        "the same seed gives the same bits, a batch equals its images alone to 1e-5, and there is a deterministic mode",
        r"test_numbers::.*(source_of_chance|deterministic|gpu_cannot)|seed_alone|differ_and_repeat|seed_decides",
    ),
    (
        "a bad model is rejected without unpickling and in little memory; the error gives file and reason",
        r"test_bad_models::(?!.*thousand_mutated)|test_unsupported|pretrained/test_folder::.*(wrong_keys|unusable)"
        r"|test_single_file::.*(further_inputs|unknown_and|lacks)",
    ),
    ("20,000 mutated headers are rejected, or read as what they say", r"twenty_thousand_mutated"),
    (
        "a bad image or mask is rejected, or read by a stated rule to stated values",
        r"test_bad_images|test_mask_formats|test_mask_report|test_scene::(?!.*(sampling|always_drawn|_prompts))",
    ),
    (
        "handles are known, well-formed and not paths; settings are in their range",
        r"test_prompt_strength|test_settings_file|test_text::.*(handle|prompt|token)",
    ),
    (
        "wrong input is reported before weights are read: one line, exit code 2",
        r"test_early|cli/test_entry::.*(wrong_lines|debug|exit_code|130)|training/test_setup::test_wrong_input",
    ),
    (
        "on a simulated GPU no tensor stays on the CPU, and the numbers are those of the CPU",
        r"test_simulated_gpu",
    ),
    ("no test uses the network or the home folder; the order of tests does not matter", r"test_conftest"),
    ("the guards stand where mutations.py removes them", r"test_mutations"),
)


def table(outcomes: dict[str, str]) -> list[str]:
    """Rows of promise, cases and cases held. outcomes: by test, as tests/test_x.py::test_y[z] -> passed, failed, ..."""
    rows = [("promise", "cases", "held")]
    for promise, pattern in PROMISES:
        names = [name for name in outcomes if re.search(pattern, name.split("[")[0].replace(".py::", "::"))]
        count = Counter(outcomes[name] for name in names)
        rows.append((promise, str(count.total()), str(count["passed"])))
    rows.append(("all tests that ran", str(len(outcomes)), str(Counter(outcomes.values())["passed"])))
    width = max(len(row[0]) for row in rows)
    return [f"{promise:{width}s} {cases:>6s} {held:>6s}" for promise, cases, held in rows]
