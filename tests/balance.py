"""Which tests share a worker, which start first, and which `make quick` runs.

A file's tests share one worker, because they share fixtures, which each worker makes for itself. The files in `APART`
have no costly fixture of their own: there, the cases of one test function share a worker.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

APART = ("kernels/test_aot.py", "kernels/test_kernels.py", "laws/test_backends.py")
# Groups of ten seconds and more on one core, longest first, so that two workers end together: a long group that starts
# last runs while the other worker has nothing left. The order of all other groups does not matter.
FIRST = (
    "cli/test_cli.py",
    "train/engine/test_trust.py",
    "examples/test_examples.py",
    "families/test_sd3.py",
    "train/engine/test_distributed.py",
    "convert/test_authors.py",
    "model/test_fitting.py",
    "model/test_runtime.py",
    "train/families/test_qwen_run.py",
    "families/test_flux.py",
    "train/test_train.py",
    "train/families/test_sd3_run.py",
    "model/test_times.py",
    "laws/test_laws.py",
    "model/test_graphs.py",
    "train/compare/test_compare.py",
    "train/families/test_flux_run.py",
    "kernels/test_aot.py::test_every_kernel_compiles",
    "kernels/test_aot.py::test_finds_fault",
    "bench/test_bench.py",
    "docs/test_site.py",
    "kernels/test_fit.py",
    "convert/test_slim.py",
    "house/test_docs.py",
    "families/test_z_image_run.py",
    "test_fuzz.py",
    "train/data/test_data.py",
)
# Groups that run when all others have begun: after code was compiled in a process, calls there may hold on to their
# arguments longer, and tests that count the bytes of a forward find more.
LAST = ("model/test_matrix.py", "model/test_compile.py")
# What `make quick` leaves out, and `make test` runs: most cases of a second and more on one core, and tests that start
# processes.
NOT_QUICK = frozenset(
    {
        "test_a_cache_that_is_killed_ends_with_the_same_bytes",
        "test_a_cell",
        "test_a_checkpoint_draws_scenes_into_a_cache",
        "test_a_comparison_goes_on_where_it_was_killed",
        "test_a_hundred_altered_copies_are_refused_or_give_equal_outputs",
        "test_a_method_makes_a_model_of_at_most_the_ratio_in_equal_steps",
        "test_a_model_that_cannot_be_is_said_to_be_none",
        "test_a_plan_for_another_checkpoint_is_refused",
        "test_a_schedule_breaks_the_graph",
        "test_a_short_program",
        "test_a_table_that_was_killed_goes_on_and_is_the_same_to_the_bit",
        "test_ada_layer_norm_many_tokens",
        "test_adapters_are_swapped_without_compiling",
        "test_alignment_is_cka_with_probes_composed_by_hand",
        "test_attention_laws",
        "test_commands",
        "test_compiles_without_a_break",
        "test_edit_model",
        "test_eval_writes_what_it_promises",
        "test_every_kernel_is_checked_and_is_fit",
        "test_every_target_asks_about_a_case_that_is_raced",
        "test_everything_is_measured_but_what_fails_and_is_killed",
        "test_exact_against_brute_force",
        "test_exact_where_losses_differ_by_orders_of_magnitude",
        "test_faults_are_named_and_left_out",
        "test_fields_are_documented",
        "test_fine_tuning_lowers_the_loss_of_eq_2",
        "test_format_1_is_saved_in_the_current_format",
        "test_functions_are_short",
        "test_gates_learn_to_keep_the_block_that_matters",
        "test_growing",
        "test_half_precision",
        "test_hooked_layers_are_called",
        "test_info_plan_and_json",
        "test_judge_passes_every_ground_truth",
        "test_judge_refuses_shuffled_captions",
        "test_killed_midway_leaves_what_it_has",
        "test_kills_leave_the_bytes_of_a_run_that_nothing_disturbed",
        "test_maps_and_low_ranks_by_the_law",
        "test_maps_survive_saving",
        "test_memory_is_that_of_a_teacher_pass_and_one_student_whatever_their_number",
        "test_more_widths_than_torch_compiles",
        "test_narrow_is_stock_with_columns_zeroed",
        "test_no_driver_without_a_gpu",
        "test_other_shapes_compile_once",
        "test_pictures_are_those_that_the_script_draws",
        "test_ours_runs_the_pipeline_with_the_steps_of_all",
        "test_parent_of_the_races_leaves_cuda_alone",
        "test_pipeline_at_lower_ratios",
        "test_probes_that_were_killed_while_tuning_end_the_same",
        "test_qkv_sampled",
        "test_random_plans_with_maps_and_text_runs",
        "test_random_plans_with_maps_grow_and_count_what_they_hold",
        "test_repeated_blocks",
        "test_sample_is_fixed_by_its_seed_and_differs_with_the_ratio",
        "test_sample_takes_a_plan",
        "test_save_and_load",
        "test_saving_over_its_own_folder",
        "test_scenes",
        "test_sequential_students_read_the_students_before_them",
        "test_stock_chain_compiles_as_one_graph",
        "test_the_installed_program_runs",
        "test_the_model_is_one_graph_a_plan",
        "test_the_reference_distils_for_the_stated_steps",
        "test_the_reference_selects_exactly_what_eq_5_finds_from_the_first_block",
        "test_the_shipped_checkpoint",
        "test_the_table_holds_every_interval_and_its_best_start",
        "test_three_sources_give_the_same_samples",
        "test_training_brings_the_prediction_nearer_to_the_teachers",
        "test_trouble_of_the_sanitizer_is_laid_to_no_kernel",
        "test_two_hundred_plans_from_one_model",
        "test_what_ends_a_process_is_found_and_the_rest_is_judged",
    }
)
# Whole files that compile, train or start processes for most tests.
NOT_QUICK_FILES = (
    "docs/test_site.py",
    "kernels/test_aot.py",
    "train/engine/test_distributed.py",
    "train/families/test_toy_family.py",
)
# All tests that need one of these: whole training runs, and every form of every kernel.
NOT_QUICK_FIXTURES = frozenset({"finished", "launches"})


def place_of(nodeid: str) -> tuple[str, str]:
    """The file of a test, from the folder of the tests, and its name without its case."""
    path, _, name = nodeid.removeprefix("tests/").partition("::")
    return path, name.partition("[")[0]


def group_of(nodeid: str) -> str:
    """The tests that share a worker with this one: ``laws/test_laws.py`` or ``kernels/test_kernels.py::test_mlp``."""
    path, function = place_of(nodeid)
    return f"{path}::{function}" if path in APART else path


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--quick``: one case of each test function that takes less than a second or so."""
    parser.addoption("--quick", action="store_true", help="one case of each test function, without the long ones")


def _leave_out_long(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first case of each test function that is quick."""
    kept, left_out, begun = [], [], set()
    for item in items:
        path, function = place_of(item.nodeid)
        long = path in NOT_QUICK_FILES or function in NOT_QUICK or item.get_closest_marker("slow")
        long = long or NOT_QUICK_FIXTURES & set(getattr(item, "fixturenames", ()))
        (left_out if long or (path, function) in begun else kept).append(item)
        begun.add((path, function))
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _mark_more_of_a_matrix(items: list[pytest.Item]) -> None:
    """Leave float16 by pointers to `make full`: `make test` has float32 by pointers, and both by descriptors."""
    for item in items:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        if str(case.get("dtype")) == "torch.float16" and case.get("tma") is False:
            item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the longest groups to the front, and those that others cannot follow to the end."""
    # On a GPU the kernels' tests are quick.
    if os.environ.get("TRITON_INTERPRET") == "1":
        _mark_more_of_a_matrix(items)
    if config.getoption("--quick"):
        _leave_out_long(config, items)
    # `make full` counts no bytes, and these are its longest.
    place = -1 if config.option.markexpr == "slow" else len(FIRST) + 1
    rank = {name: number for number, name in enumerate(FIRST)} | dict.fromkeys(LAST, place)
    # A stable sort: a file's tests stay in their order.
    items.sort(key=lambda item: rank.get(group_of(item.nodeid), len(FIRST)))


# Optional: a python without pytest-xdist (a GPU run's) does not know this hook.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send the groups to the workers in this order, each as soon as a worker is nearly done with its last.

    ``--dist loadgroup`` is meant for this, but pytest-xdist 3.8.0 under pytest 9.2.0 ignores the marks of groups.
    """
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
