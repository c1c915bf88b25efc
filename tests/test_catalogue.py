"""The catalogue of bad inputs and faults: every row names the tests that it has, and they exist.

A name is that of a test, of a function that makes a bad input and stands in the table of a test, or
of such a table. SECURITY.md says what the tool promises.
"""

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WEIGHTS, CONFIG, BAD = "io/damaged_weights.py", "io/damaged_config.py", "cli/test_bad_input.py"
FILES, USAGE, FINE = "cli/bad_files.py", "cli/bad_usage.py", "cli/test_untrusted.py"
TROUBLE, TEXTS = "cli/test_trouble.py", "test_texts.py"

#: Row -> file -> names.
CATALOGUE = {
    "truncated, corrupt or empty safetensors": {
        BAD: "truncated_safetensors safetensors_cut_inside_the_header empty_safetensors",
        WEIGHTS: "_truncated trailing_bytes header_not_json overlapping_tensors size_against_shape",
        "io/test_hostile.py": "test_header_bytes_mutated test_header_fields_mutated",
    },
    "LFS pointer or HTML saved as safetensors": {BAD: "lfs_pointer", WEIGHTS: "html_page"},
    "duplicate key in header": {WEIGHTS: "duplicate_header_key"},
    "missing shard; tensor absent from its shard; tensor in two files": {
        BAD: "missing_shards_all_named",
        WEIGHTS: "two_missing_shards tensor_absent_from_its_shard tensor_in_two_files",
    },
    "only pytorch_model.bin": {BAD: "pickle_only_folder", WEIGHTS: "pickle_pth_only"},
    "NaN or infinite weights": {
        BAD: "nan_weights nan_weights_of_the_base",
        WEIGHTS: "infinite_weights_in_two_tensors",
    },
    "NaN activations from finite weights": {BAD: "nan_activations_from_finite_weights"},
    "shape differs from config": {
        BAD: "shape_against_config",
        WEIGHTS: "shapes_against_the_config",
    },
    "config.json missing, not JSON, wrong types": {
        BAD: "missing_config config_that_is_not_json config_of_wrong_types",
        CONFIG: "config_with_several_faults_lists_all",
    },
    "unsupported architecture; encoder-decoder, vision, MoE, Mamba": {
        BAD: "unsupported_model model_without_a_language_head",
        FILES: "KINDS",
        CONFIG: "_unsupported",
    },
    "quantised: fp8, bnb, gptq, awq, GGUF": {
        BAD: "quantised_model quantised_gguf quantised_tensors",
        CONFIG: "_quantised",
        WEIGHTS: "float8_tensor integer_tensor gptq_tensor_names",
    },
    "tied embeddings in both directions, head missing": {
        WEIGHTS: "untied_without_head tied_with_another_head",
        "io/test_hostile.py": "test_tied_with_an_equal_head_is_accepted",
        "cli/test_tokenizers.py": "test_both_sides_of_tying_occur",
    },
    "vocabulary padding, more tokens than rows, added tokens": {
        BAD: "tokenizer_with_more_ids_than_rows",
        FILES: "added_tokens_beyond_the_rows",
        FINE: "test_added_tokens_within_the_rows_are_kept",
        "cli/output_contract.py": "has_tensors_of_the_names_shapes_and_dtypes_of_the_target",
    },
    "tokenizer without pad token": {"cli/output_contract.py": "has_all_other_files_byte_for_byte"},
    "tokenizer missing, SentencePiece alone, slow": {
        BAD: "missing_tokenizer broken_tokenizer",
        FILES: "damaged_sentencepiece_alone",
        "test_spelling.py": "test_slow_tokenizers_are_refused_by_name",
    },
    "BOS, EOS or template differences": {
        FINE: "test_the_output_stops_at_the_eos_of_the_target",
        "io/test_roundtrip.py": "test_transformers_stops_at_the_targets_eos",
    },
    "source is the target": {
        FINE: "test_a_model_merged_with_itself",
        "merge/test_merge.py": "test_a_model_merged_with_itself_finds_itself",
        "cli/test_run.py": "test_delta_of_a_source_that_is_its_base_is_the_target",
    },
    "calibration empty": {BAD: "empty_text text_of_blank_lines"},
    "one line or too few tokens": {
        BAD: "fewer_than_two_usable_rows too_few_documents_for_a_dev_split"
    },
    "huge file or one endless line": {
        BAD: "test_bomb_costs_little_to_refuse",
        FILES: "endless_line endless_line_of_jsonl bad_byte_late_in_a_large_text",
        TEXTS: "test_reading_is_lazy",
    },
    "not UTF-8: latin-1, UTF-16, BOM, NUL": {
        BAD: "text_that_is_not_utf8 text_in_utf16 unknown_encoding",
        TEXTS: "test_a_nul_byte_names_its_line test_a_byte_order_mark_is_dropped",
        TROUBLE: "test_other_encodings_are_read_when_named",
    },
    "broken jsonl line, missing field, mixed types": {
        BAD: "broken_line_of_jsonl jsonl_without_the_field",
        TEXTS: "test_a_bad_json_line_is_named",
    },
    "garbage parquet; hub dataset gated or offline": {
        "io/test_records.py": "test_garbage_is_no_parquet test_what_is_no_dataset_is_told",
        "cli/test_hub.py": "test_what_is_not_there_is_one_sentence",
    },
    "disk full at byte N": {
        TROUBLE: "test_full_disk_is_a_resource_error_and_keeps_finished_stages_alone",
        "io/test_publish.py": "test_file_size_limit_stands_in_for_a_full_disk",
    },
    "out of RAM: the preflight refuses above --memory-limit": {
        USAGE: "run_that_does_not_fit",
        "test_memory.py": "test_limit_of_a_container_counts "
        "test_machine_is_the_limit_if_none_is_given",
    },
    "kill -9, then resume; kill between export and rename": {
        "cli/test_resume.py": "test_killed_process_is_resumed_with_the_same_bytes "
        "test_kill_at_twenty_random_moments",
        "test_staged.py": "test_kill_at_every_commit_point_in_turn",
        "io/test_stages.py": "test_kill_between_the_two_renames_brings_the_old_folder_back",
    },
    "SIGINT, SIGTERM": {
        TROUBLE: "test_interrupt_from_outside test_interrupt_before_anything_is_finished"
    },
    "bit flip in the state of a run": {
        "test_staged.py": "test_flipped_byte_is_redone_and_never_used"
    },
    "read-only parent of the output, output that is a file, inside or equal to an input": {
        TROUBLE: "test_output_whose_parent_is_not_writable",
        BAD: "output_that_is_a_file output_inside_an_input output_that_is_an_input",
    },
    "existing output; two runs with the same output": {
        BAD: "output_that_exists_and_is_not_empty",
        TROUBLE: "test_second_run_to_the_same_folder_is_refused "
        "test_overwrite_replaces_the_folder_and_leaves_nothing_else",
    },
    "weight_map that leaves the folder": {
        CONFIG: "_escaping link_out_of_the_folder",
        "io/test_hostile.py": "test_weight_map_mutated",
        "io/test_roundtrip.py": "test_hub_snapshot_of_links_into_blobs_loads_and_saves",
    },
    "symlink loop, FIFO or device": {
        CONFIG: "link_loop dangling_link",
        WEIGHTS: "fifo_as_weights",
        FILES: "in_place_of pipe_as_calibration pipe_as_recipe",
        "io/test_save.py": "test_writer_refuses_an_existing_target_and_a_link",
    },
    "output name with newline, unicode, spaces, very long": {
        TROUBLE: "test_output_names",
        "io/test_publish.py": "test_odd_names_work test_name_too_long_is_an_input_error",
    },
    "model that needs remote code": {
        BAD: "remote_code_model",
        "test_calibration.py": "test_a_tokenizer_never_runs_code",
    },
    "hostile chat template": {
        FINE: "test_hostile_chat_template_is_copied_and_not_rendered",
        FILES: "TEMPLATES",
        "test_chat.py": "test_a_hostile_template_is_an_input_error",
    },
    "YAML bomb, python tag, deep nesting": {
        FILES: "recipe_that_is_an_alias_bomb recipe_of_nested_lists recipe_of_200_megabytes",
        USAGE: "recipe_with_a_python_tag",
        FINE: "test_bombs_in_a_card_are_no_licence",
        "io/test_records.py": "test_what_is_no_dataset_is_told",
    },
    "duplicate or unknown YAML keys, `1e-3`, `no`": {
        USAGE: "recipe_with_a_key_twice unknown_recipe_key",
        "test_recipe.py": "test_numbers_that_yaml_reads_as_text_are_numbers test_yaml_booleans",
    },
    "JSON bomb in config or index, 100 MB header": {
        FILES: "config_of_200_megabytes index_of_200_megabytes header_of_200_megabytes",
        WEIGHTS: "header_deeply_nested",
    },
    "model name as shell, Markdown or HTML in the card": {
        FINE: "test_hostile_names_stay_text_in_the_card "
        "test_code_fences_of_the_card_hold_their_content"
    },
    "secrets in config or environment": {
        FINE: "test_secrets_are_in_no_output_and_no_log",
        "cli/test_hub.py": "test_a_run_by_hub_ids_offline",
    },
    "epsilon 0, negative, NaN; max_iterations 0": {USAGE: "VALUES"},
    "constant activations": {
        FINE: "test_constant_activations_of_a_whole_layer",
        TROUBLE: "test_constant_neurons_are_fine",
    },
    "hidden 1, heads 1, 1 layer, layers 2 against 48": {FINE: "test_extreme_shapes"},
    "clock skew, locks, file systems that ignore case": {
        "io/test_publish.py": "test_lock_of_a_process_that_was_killed_is_no_obstacle"
    },
}
#: Rows whose part of the tool is still to come.
LATER = (
    "model name as HTML in the report",
    "different process counts at resume, mesh change",
    "one host of a pod dies",
)


@functools.cache
def defined(file):
    """Names at the top level of a file of tests."""
    found = set()
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {one.id for one in node.targets if isinstance(one, ast.Name)}
    return found


@pytest.mark.parametrize("row", CATALOGUE)
def test_every_row_names_tests_that_exist(row):
    assert CATALOGUE[row]
    for file, names in CATALOGUE[row].items():
        assert names.split()
        assert set(names.split()) <= defined(file), file


def test_no_row_is_both_tested_and_to_come():
    assert not CATALOGUE.keys() & set(LATER)
