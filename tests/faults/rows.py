"""What each kind of bad input and each fault gives, and which test shows it on each host.

A row has for each host, or for all hosts of a framework, or for all, one of

- CASES, which are those of bad_input.py, alone or with tests beside them;
- tests, as ``file::function`` from the folder of tests, several with a blank between them;
- why it does not apply, as `Not`.

What a host's own name has goes before what its framework has, and that before what all have.
"""

from typing import NamedTuple

NAMES = ("numpy", "torch", "jax kernel", "jax transform", "keras torch", "keras jax", "keras tensorflow")
CASES = "cases"


class Not(NamedTuple):
    """Why a row does not apply to a host."""

    why: str


class Row(NamedTuple):
    """What is given, what it must give, and where that is tested."""

    given: str
    gives: str
    shown: dict


# Files and what is wrong with them are the same for every host, since each saves by `nadam.checkpoint`: the patterns of
# the files that test them. To be replaced by tests, as in the other rows.
FILES = {
    23: "test_files_*.py",
    28: "test_files.py",
    29: "test_files.py",
    40: "test_files_*.py",
}

IMMUTABLE = Not("arrays of JAX are neither changed in place nor share memory that others can reach")
NO_MEMORY = Not("variables of this backend share no memory that others can reach")
ONE_PROGRAM = Not("a step is one compiled program, and no Python in which a signal could be looked for")
NO_FORK = Not("the framework's own threads are not there in the child of a fork, and nothing of it works")
OWN_LAYOUT = Not("arrays have no strides: what comes in is copied to the framework's own layout")

F, L, S = "test_faults.py", "test_layouts.py", "test_state.py"
T, E = "torch/test_torch_faults.py", "torch/test_torch_extras.py"
J = "jax/test_jax_faults.py"
K, R, M = "keras/test_faults_keras.py", "keras/test_robustness.py", "keras/test_migration.py"
AGREE = "test_hosts_agree.py::test_a_step_is_that_of_the_reference"

ROWS = {
    1: Row("lr NaN, infinite or negative; eps negative or NaN", "ValueError that names it", {"all": CASES}),
    2: Row("a beta outside of [0, 1)", "ValueError that names it", {"all": CASES}),
    3: Row(
        "weight decay < 0, clipnorm or loss scale <= 0, accumulation of 2.5, 1 or True, overwriting every 0 updates",
        "ValueError that names it",
        {"all": CASES, "jax kernel": f"{CASES} {J}::test_loss_scale"},
    ),
    4: Row("two clips; an unknown argument", "ValueError or TypeError that names them", {"all": CASES}),
    5: Row(
        "a setting that is set or computed out of its range during training",
        "ValueError at that step, nothing changed; within a compiled program NaN",
        {
            "numpy": f"{CASES} {F}::test_a_value_computed_out_of_range",
            "torch": f"{CASES} {T}::test_row_5_a_setting_of_one_group_out_of_range",
            "jax": f"{J}::test_a_schedule_that_leaves_the_range {J}::test_an_injected_number_out_of_its_range",
            "keras": f"{CASES} {K}::test_a_value_computed_out_of_range {K}::"
            f"test_a_callable_that_gives_a_bad_value_to_a_compiled_step {K}::"
            "test_a_schedule_that_gives_a_bad_value_to_a_compiled_step",
        },
    ),
    6: Row(
        "a parameter twice in one call; memory that overlaps or is expanded",
        "ValueError, nothing changed",
        {
            "numpy": f"{F}::test_the_same_parameter_twice {F}::test_memory_that_overlaps",
            "torch": f"{T}::test_row_6_the_same_parameter_twice_and_shared_memory "
            f"{E}::test_an_expanded_parameter_is_refused_before_anything_changes",
            "jax": IMMUTABLE,
            "keras": f"{K}::test_the_same_variable_twice",
            "keras torch": f"{K}::test_the_same_variable_twice {K}::test_memory_that_overlaps",
        },
    ),
    7: Row(
        "a gradient with NaN or infinity",
        "as the reference; with skip_nonfinite nothing changed, and counted",
        {
            "numpy": f"{F}::test_a_gradient_that_is_not_finite",
            "torch": f"{T}::test_row_7_nan_spreads_as_in_pytorch {E}::test_skip_nonfinite",
            "jax": f"{J}::test_gradients_that_are_not_finite",
            "jax kernel": f"{J}::test_gradients_that_are_not_finite {J}::test_skipping",
            "keras": f"{R}::test_a_gradient_that_is_not_finite "
            f"{R}::test_calls_with_a_gradient_that_is_not_finite_are_skipped_and_counted",
        },
    ),
    8: Row(
        "float16, gradients of 1e-5, 0 and 300",
        "about 0.99, 1 and 0.99 from 1 with lr 0.01",
        {
            "numpy": f"{F}::test_float16_gradients_that_are_small_none_or_large",
            "torch": f"{T}::test_row_8_float16",
            "jax": f"{J}::test_float16",
            "keras": f"{R}::test_float16_gradients_that_are_small_none_or_large",
        },
    ),
    9: Row(
        "float32, a gradient of 1e25",
        "clipped right; with skip_nonfinite skipped; else as the reference",
        {
            "numpy": f"{F}::test_float32_gradients_whose_square_overflows",
            "torch": f"{T}::test_row_9_a_large_gradient {E}::test_skip_nonfinite",
            "jax": "jax/test_jax_extremes.py::test_a_gradient_whose_square_overflows",
            "jax kernel": f"{J}::test_large_gradients_are_clipped_right {J}::test_skipping",
            "keras": f"{R}::test_float32_gradients_whose_square_overflows",
        },
    ),
    10: Row(
        "a bfloat16 parameter, 1,000 steps with lr 1e-4",
        "moves as a float32 one where a remainder is kept",
        {"all": Not("keeps no remainder"), "torch": f"{T}::test_row_10_bfloat16_as_float32"},
    ),
    11: Row(
        "the gradient after the step",
        "left as found",
        {
            "numpy": f"{F}::test_the_gradient_is_left_as_found",
            "torch": f"{E}::test_gradients_are_left_as_found",
            "jax": f"{J}::test_the_gradient_after_the_step",
            "keras": f"{R}::test_a_gradient_gives_the_same_bits_however_it_comes_and_is_left_as_found",
        },
    ),
    12: Row(
        "parameters without elements, and without dimensions",
        "work",
        {
            "numpy": f"{F}::test_zero_size_and_scalar_parameters",
            "torch": AGREE,
            "jax": f"{AGREE} {J}::test_empty_trees_and_arrays",
            "keras": f"{K}::test_zero_size_and_scalar_variables",
        },
    ),
    13: Row(
        "parameters or gradients that are transposed, strided, unaligned or in Fortran's order",
        "the bits of contiguous ones",
        {
            "numpy": f"{L}::test_same_bits_in_any_layout",
            "torch": f"{T}::test_row_13_an_unaligned_parameter "
            "torch/test_torch_drop_in.py::test_parameters_that_are_not_contiguous",
            "jax": OWN_LAYOUT,
            "keras": f"{R}::test_a_gradient_gives_the_same_bits_however_it_comes_and_is_left_as_found",
            "keras torch": f"{R}::test_variables_of_any_layout_give_the_bits_of_contiguous_ones "
            f"{R}::test_a_gradient_gives_the_same_bits_however_it_comes_and_is_left_as_found",
        },
    ),
    14: Row(
        "a read-only array",
        "ValueError that names it, nothing changed",
        {
            "numpy": f"{F}::test_a_read_only_array",
            "torch": Not("tensors are never read-only"),
            "jax": IMMUTABLE,
            "keras": Not("variables are never read-only"),
        },
    ),
    15: Row(
        "gradients of other shapes, or more or fewer of them",
        "ValueError, of PyTorch's own RuntimeError; nothing changed",
        {
            "all": CASES,
            "numpy": f"{CASES} {F}::test_gradients_of_no_parameter",
            "keras": f"{CASES} {K}::test_other_variables {K}::"
            "test_missing_gradients_are_reported_as_keras_reports_them",
            "keras tensorflow": f"{CASES} {K}::test_other_variables {K}::"
            "test_a_gradient_whose_shape_is_known_only_when_compiled_code_runs",
        },
    ),
    16: Row(
        "parameters of integers, bools, objects, text or structures",
        "TypeError",
        {
            "numpy": f"{CASES} {F}::test_something_that_is_no_parameter",
            "torch": f"{CASES} {T}::test_row_16_a_parameter_that_is_no_real_number",
            "jax": f"{CASES} {J}::test_parameters_that_are_not_floating_point_numbers",
            "keras": f"{K}::test_variables_that_are_not_of_real_numbers",
        },
    ),
    17: Row(
        "complex parameters",
        "two real ones in NumPy, PyTorch and optax's two phases, else TypeError; no complex gradient of a real one",
        {
            "numpy": f"{CASES} {L}::test_complex_parameters_are_two_reals",
            "torch": f"{CASES} {AGREE}",
            "jax kernel": f"{CASES} jax/test_jax_complex.py::test_what_is_refused",
            "jax transform": f"{CASES} jax/test_jax_complex.py::test_each_update_as_a_twin_in_float64",
            "keras": f"{CASES} {K}::test_variables_that_are_not_of_real_numbers {K}::test_a_complex_gradient",
        },
    ),
    18: Row(
        "a sparse gradient",
        "RuntimeError in PyTorch, ValueError in JAX, right in Keras",
        {
            "numpy": Not("NumPy has no sparse arrays"),
            "torch": f"{T}::test_row_18_a_sparse_gradient",
            "jax": CASES,
            "keras": "keras/test_fit.py::test_a_sparse_gradient_does_what_the_dense_one_does "
            f"{R}::test_a_gradient_gives_the_same_bits_however_it_comes_and_is_left_as_found",
        },
    ),
    19: Row(
        "arrays of another byte order, masked arrays, matrices, memory maps",
        "right, or TypeError; a memory map works",
        {
            "torch": Not("takes no arrays of NumPy"),
            "keras": f"{K}::test_arrays_of_another_byte_order_and_masked_ones",
            "numpy": f"{F}::test_something_that_is_no_parameter {L}::test_a_gradient_of_another_dtype "
            f"{L}::test_a_memory_map {L}::test_a_matrix",
            "jax": f"{J}::test_arrays_of_another_byte_order_and_masked_ones",
        },
    ),
    20: Row(
        "a gradient of another dtype or on another device",
        "right, or refused",
        {
            "numpy": f"{L}::test_a_gradient_of_another_dtype",
            "torch": f"{CASES} {T}::test_row_20_gradients_whose_dtype_is_let_free",
            "jax": f"{J}::test_gradients_that_are_not_real_numbers",
            "keras": f"{R}::test_a_gradient_gives_the_same_bits_however_it_comes_and_is_left_as_found",
            "keras torch": f"{R}::test_a_gradient_gives_the_same_bits_however_it_comes_and_is_left_as_found "
            f"{R}::test_a_gradient_on_another_device",
        },
    ),
    21: Row(
        "a parameter that is added during training",
        "starts fresh in PyTorch, is refused elsewhere",
        {
            "numpy": f"{F}::test_arrays_that_the_optimizer_does_not_know",
            "torch": "torch/test_torch_drop_in.py::test_a_group_that_is_added_starts_fresh",
            "jax": "faults/test_bad_input.py::test_a_gradient_that_does_not_fit",
            "keras": f"{K}::test_other_variables",
        },
    ),
    22: Row(
        "more than 2**31 elements",
        "64-bit indices throughout",
        {
            "all": f"{F}::test_more_than_two_to_the_31_elements",
            "jax transform": Not("XLA makes its own loops"),
            "keras tensorflow": Not("TensorFlow makes its own loops"),
        },
    ),
    23: Row(
        "state of other shapes or another optimizer, with NaN, reordered, cut or with a bit flipped",
        "refused with the name of what is wrong, nothing changed; reordered, it is matched by name",
        {
            "numpy": f"{S}::test_a_state_that_is_wrong_is_refused {S}::test_parameters_are_matched_by_name",
            "torch": f"{T}::test_row_23_damaged_state_is_refused "
            f"{T}::test_the_state_of_another_optimizer_names_what_takes_it "
            "torch/test_torch_drop_in.py::test_named_parameters_in_another_order_are_matched_by_name",
            "jax": f"{J}::test_state_that_does_not_fit {J}::test_state_of_another_optimizer",
            "keras": f"{M}::test_state_of_another_optimizer_is_refused {M}::test_arrays_are_matched_by_name "
            f"{M}::test_values_that_are_no_state_are_refused_by_name",
        },
    ),
    24: Row(
        "float32 state loaded beside bfloat16 parameters",
        "stays float32",
        {
            "numpy": f"{S}::test_float32_state_stays_float32_beside_bfloat16_parameters",
            "torch": f"{E}::test_half_precision_has_moments_in_float32",
            "jax": f"{J}::test_wide_state_beside_narrow_parameters_stays_wide",
            "keras": "keras/test_saving.py::test_the_state_of_half_precision_variables_stays_float32",
        },
    ),
    25: Row(
        "KeyboardInterrupt during a step",
        "counters agree with what has moved",
        {
            "numpy": "test_interrupt.py::test_after_any_slice test_interrupt.py::test_random_moments",
            "torch": f"{T}::test_row_25_and_32_an_interrupt_leaves_counters_that_agree",
            "jax": f"{J}::test_an_interrupt_leaves_what_was_there",
            "keras torch": f"{R}::test_an_interrupt_wherever_python_looks_for_one",
            "keras jax": "keras/test_on_jax.py::test_an_interrupt_between_the_variables_leaves_a_step_that_is_whole",
            "keras tensorflow": ONE_PROGRAM,
        },
    ),
    26: Row(
        "a fork after a step, then a step in the child",
        "works",
        {
            "numpy": "test_threads.py::test_a_step_in_the_child_of_a_fork_and_at_exit",
            "torch": f"{T}::test_row_26_fork_after_a_step",
            "jax": NO_FORK,
            "keras": NO_FORK,
            "keras torch": f"{R}::test_a_step_in_the_child_of_a_fork",
        },
    ),
    27: Row(
        "eight threads with an optimizer each; two threads with one",
        "as one after the other",
        {
            "numpy": "test_threads.py::test_eight_threads_with_an_optimizer_each "
            "test_threads.py::test_two_threads_with_one_optimizer "
            "faults/test_within_a_step.py::test_another_thread_waits",
            "torch": f"{T}::test_row_27_eight_threads_with_an_optimizer_each "
            f"{T}::test_row_27_two_threads_with_one_optimizer "
            "faults/test_within_a_step.py::test_another_thread_waits",
            "jax": f"{J}::test_threads",
            "keras": f"{R}::test_eight_threads_with_an_optimizer_each {R}::test_two_threads_with_one_optimizer",
        },
    ),
    28: Row("a process that is killed while it saves", "the old file or the new one, whole", {}),
    29: Row(
        "a bit flipped anywhere in a saved file; the file cut at any byte",
        "refused with the reason",
        {
            "torch": f"{T}::test_row_29_one_flipped_bit_or_a_cut_is_refused",
            "jax": f"{J}::test_one_flipped_bit_or_a_cut_is_refused",
            "keras": f"{M}::test_a_flipped_bit_in_any_array_of_a_file_is_refused {M}::test_a_file_cut_short_is_refused",
        },
    ),
    30: Row(
        "a read-only installation, no home, a full disk, a damaged or stale cache, eight cold starts at once",
        "works",
        {
            "all": "test_native.py::test_a_cache_that_takes_nothing_is_done_without "
            "test_native.py::test_an_installation_that_is_read_only "
            "test_native.py::test_no_home_is_done_without test_native.py::test_damaged_files_are_replaced "
            "test_native.py::test_a_changed_rule_is_never_served_from_an_old_cache "
            "test_native.py::test_eight_cold_starts_at_once"
        },
    ),
    31: Row(
        "1, 2 and 4 threads, again and again",
        "the same bits",
        {
            "numpy": "test_threads.py::test_bits_do_not_depend_on_threads "
            "test_threads.py::test_bits_of_a_large_tensor_do_not_depend_on_threads",
            "torch": f"{T}::test_row_31_the_same_bits_on_any_number_of_threads "
            "torch/test_torch_threads.py::test_the_bits_are_those_of_any_threads",
            "jax": f"{J}::test_threads",
            "keras": Not("threads are the backend's"),
            "keras torch": f"{R}::test_bits_do_not_depend_on_threads",
        },
    ),
    32: Row(
        "SIGINT during a long step",
        "answered within 0.1 s",
        {
            "numpy": "test_interrupt.py::test_a_signal_is_answered_soon",
            "torch": f"{T}::test_row_25_and_32_an_interrupt_leaves_counters_that_agree "
            "torch/test_torch_threads.py::test_an_interrupt_comes_between_two_regions",
            "jax": ONE_PROGRAM,
            "keras": ONE_PROGRAM,
            "keras torch": f"{R}::test_a_signal_is_answered_after_the_slice_at_work",
        },
    ),
    33: Row(
        "tensors, entries, steps and parameters that are exchanged, replaced, cleared or removed between steps",
        "as with the stock optimizer",
        {
            "numpy": "test_mistakes.py::test_an_array_that_has_taken_a_parameters_place "
            f"{L}::test_an_array_that_is_reshaped_or_retyped_in_place_is_noticed",
            "torch": "torch/test_torch_edits.py::test_edits_between_steps",
            "jax": Not("state is a value that is handed in at each step; of another structure: row 23"),
            "keras": Not("values are read from the variables at each step"),
            "keras torch": "keras/test_on_torch.py::test_memory_that_is_exchanged_between_steps",
        },
    ),
    34: Row(
        "overlap across groups; interleaved views without overlap",
        "ValueError, nothing changed; right",
        {
            "numpy": f"{F}::test_memory_that_overlaps",
            "torch": "torch/test_torch_memory.py::test_groups_that_share_memory_are_refused "
            "torch/test_torch_memory.py::test_parameters_may_be_interleaved",
            "jax": IMMUTABLE,
            "keras": NO_MEMORY,
            "keras torch": f"{K}::test_memory_that_overlaps",
        },
    ),
    35: Row(
        "a gradient of zeros and then none in one window",
        "counts as seen",
        {
            "numpy": f"{F}::test_a_gradient_of_zeros_counts_as_seen",
            "torch": f"{E}::test_a_gradient_of_zeros_counts_as_seen",
            "jax": Not("no gradient may be missing: row 15"),
            "keras": Not("compiled programs know of a gradient by its accumulator alone"),
            "keras torch": "keras/test_rows.py::test_a_gradient_of_zeros_counts_as_seen",
        },
    ),
    36: Row(
        "`fused` where optax's two phases are expected",
        "an error at once",
        {
            "all": Not("has no two phases"),
            "jax transform": Not("these are optax's two phases"),
            "jax kernel": "jax/test_jax_two_phases.py::test_a_loop_of_two_phases_is_refused",
        },
    ),
    37: Row(
        "epsilon 0 or below the smallest normal number, with a gradient of 0",
        "as the reference",
        {
            "numpy": "test_extremes.py::test_epsilon",
            "torch": "torch/test_torch_extremes.py::test_epsilon",
            "jax": "jax/test_jax_extremes.py::test_epsilon",
            "keras": "keras/test_extremes_keras.py::test_epsilon",
        },
    ),
    38: Row(
        "a cache whose folder or files others can write to or own; a FIFO in it",
        "not loaded, and nothing hangs",
        {
            "all": "test_native_trust.py::test_a_folder_that_others_can_write_to_is_not_used "
            "test_native_trust.py::test_a_folder_of_somebody_else_is_not_used "
            "test_native_trust.py::test_a_file_that_others_can_write_to_is_replaced "
            "test_native_trust.py::test_a_file_of_somebody_else_is_replaced "
            "test_native_trust.py::test_what_is_no_file_is_replaced"
        },
    ),
    39: Row(
        "a fork while another thread is within a step",
        "the child steps, or is told why not",
        {
            "all": "test_fork.py::test_while_another_thread_is_within_a_step",
            "jax": NO_FORK,
            "keras jax": NO_FORK,
            "keras tensorflow": NO_FORK,
        },
    ),
    40: Row(
        "a saved file with leftovers of killed saves, a mode, a link, odd keys, or a header that lies",
        "removed; kept; followed; equal or refused by key; refused before anything is allocated",
        {},
    ),
}


def shown(number, name):
    """What the table has of a row for a host."""
    row = ROWS[number].shown
    return next((row[key] for key in (name, name.split()[0], "all") if key in row), None)
