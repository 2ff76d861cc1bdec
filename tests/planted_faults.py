"""Plants one fault at a time in a copy of the package and checks that its test file notices.

    python tests/planted_faults.py          # all of them, in twenty minutes
    python tests/planted_faults.py optim    # those whose file name contains a word
    python tests/planted_faults.py 1/3      # every third, the second first

Every fault names the test whose work it is to notice it. Prints a line for each and exits with 1 if
one was missed, or if one of the tests fails without any. Not collected by pytest.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 180
NUM_WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Fault:
    """In `file` of the package, `old` becomes `new`; `test`, 'file.py::name', must fail."""

    what: str
    file: str
    old: str
    new: str
    test: str


FAULTS = [
    Fault(
        "the last knot at its full weight",
        "losses.py",
        "(2 * spacing * normal).at[-1].multiply(0.5)",
        "2 * spacing * normal",
        "test_losses_beside_vicreg.py::test_value_and_terms_are_those_of_the_definition",
    ),
    Fault(
        "SimCLR contrasts a row with itself",
        "losses.py",
        "jnp.where(is_self, -jnp.inf, scores)",
        "scores",
        "test_losses_beside_vicreg.py::test_value_and_terms_are_those_of_the_definition",
    ),
    Fault(
        "LeJEPA's statistic without N",
        "losses.py",
        "views.shape[1] * statistic",
        "statistic",
        "test_losses_beside_vicreg.py::test_lejepas_term_counts_the_images",
    ),
    Fault(
        "the number of pairs does not reach the loss",
        "objectives.py",
        "num_pairs=num_pairs, **sizes)",
        "num_pairs=1, **sizes)",
        "test_objectives.py::test_every_name_is_its_loss_with_the_coefficients_of_the_step",
    ),
    Fault(
        "patches are dropped before their positions are added",
        "vit.py",
        "x = x + self._positions(height, width)[None].astype(self.dtype)",
        "x = x + self._positions(height, width)[None, :1, :1].astype(self.dtype)",
        "test_vit.py::test_patches_are_dropped_after_their_positions_were_added",
    ),
    Fault(
        "rows and columns of the fixed positions swapped",
        "vit.py",
        "jnp.concatenate([columns, rows], axis=2)",
        "jnp.concatenate([rows, columns], axis=2)",
        "test_vit.py::test_sincos_positions_are_the_formula",
    ),
    Fault(
        "a counter of updates is averaged like the moments",
        "representation.py",
        "jnp.full_like(leaf, _MANY_UPDATES)",
        "leaf",
        "test_own_encoders.py::test_re_estimated_statistics_are_the_moments_of_clean_images",
    ),
    Fault(
        "a gradient reaches what is predicted",
        "predictors.py",
        "t1, t2 = jax.lax.stop_gradient(targets)",
        "t1, t2 = targets",
        "test_predictors.py::test_no_gradient_reaches_what_is_predicted[views]",
    ),
    Fault(
        "a target network that stands still",
        "train_step.py",
        "momentum * t + (1 - momentum) * p",
        "t + 0 * p",
        "test_predictors.py::test_the_target_follows_by_the_law_of_a_moving_average",
    ),
    Fault(
        "patches that are to be predicted are context",
        "masks.py",
        "jnp.where(is_target, -1.0, rank)",
        "rank",
        "test_masks.py::test_context_has_no_patch_twice_and_none_of_a_target",
    ),
    Fault(
        "a sign: the views are added",
        "losses.py",
        "jnp.square(z1 - z2)",
        "jnp.square(z1 + z2)",
        "test_losses.py::test_terms_equal_the_definitions",
    ),
    Fault(
        "ddof 0 in the variance",
        "losses.py",
        "jnp.sum(jnp.square(_centred(z)), axis=0) / (z.shape[0] - 1)",
        "jnp.sum(jnp.square(_centred(z)), axis=0) / z.shape[0]",
        "test_losses.py::test_terms_equal_the_definitions",
    ),
    Fault(
        "ddof 0 in the covariance",
        "losses.py",
        "z.T @ z / (num_rows - 1)",
        "z.T @ z / num_rows",
        "test_losses.py::test_terms_equal_the_definitions",
    ),
    Fault(
        "ddof 0 in the Gram matrix",
        "losses.py",
        "jnp.square(z @ z.T / (num_rows - 1))",
        "jnp.square(z @ z.T / num_rows)",
        "test_losses.py::test_terms_equal_the_definitions",
    ),
    Fault(
        "NaN where the squares of the covariance overflow",
        "losses.py",
        "jnp.where(jnp.isinf(norm), norm, norm - jnp.sum(jnp.square(variances)))",
        "norm - jnp.sum(jnp.square(variances))",
        "test_losses.py::test_where_squares_of_the_covariance_overflow_nothing_is_nan",
    ),
    Fault(
        "the covariance centred along the wrong axis",
        "losses.py",
        "jnp.mean(z, axis=0, keepdims=True)",
        "jnp.mean(z, axis=1, keepdims=True)",
        "test_losses.py::test_terms_equal_the_definitions",
    ),
    Fault(
        "eps outside the square root",
        "losses.py",
        "jnp.sqrt(variances + eps)",
        "(jnp.sqrt(variances) + eps)",
        "test_losses.py::test_terms_equal_the_definitions",
    ),
    Fault(
        "the paper's balance off by one",
        "losses.py",
        "return (num_dims - 1) / 25",
        "return num_dims / 25",
        "test_losses.py::test_without_cov_coeff_it_is_the_papers_25_25_1_divided_by_25",
    ),
    Fault(
        "the variance of one view twice",
        "losses.py",
        "variance_loss(z1) + variance_loss(z2)",
        "variance_loss(z1) + variance_loss(z1)",
        "test_losses.py::test_terms_equal_the_definitions",
    ),
    Fault(
        "invariance within a pair of views alone",
        "losses.py",
        "2 / (views.shape[0] - 1)",
        "2 / views.shape[0]",
        "test_losses.py::test_of_several_pairs_invariance_is_over_all_pairs_of_an_images_views",
    ),
    Fault(
        "views of several pairs interleaved",
        "augment.py",
        "jnp.concatenate([images] * num_pairs)",
        "jnp.repeat(images, num_pairs, axis=0)",
        "test_augment.py::test_of_several_pairs_the_views_of_an_image_lie_a_batch_apart",
    ),
    Fault(
        "LARS clips the ratio, not the rate",
        "optim.py",
        "jnp.minimum(ratio / rate, 1.0)",
        "jnp.minimum(ratio, 1.0)",
        "test_optim.py::test_lars_equals_the_references_formula",
    ),
    Fault(
        "LARS scales one-axis parameters",
        "optim.py",
        "if p.ndim <= 1:",
        "if p.ndim < 1:",
        "test_optim.py::test_lars_equals_the_references_formula",
    ),
    Fault(
        "LARS damps the new gradient too",
        "optim.py",
        "lambda m, g: momentum * m + g,",
        "lambda m, g: momentum * (m + g),",
        "test_optim.py::test_lars_equals_the_references_formula",
    ),
    Fault(
        "weight decay on one-axis parameters",
        "optim.py",
        "jnp.ndim(p) > 1",
        "jnp.ndim(p) > 0",
        "test_optim.py::test_sgd_is_heavy_ball_with_l2_decay_of_the_weights",
    ),
    Fault(
        "Muon orthogonalises the wrong axes",
        "optim.py",
        "MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)",
        "MuonDimensionNumbers(tuple(range(1, p.ndim)), 0)",
        "test_optim.py::test_muon_orthogonalises_convolutions_and_leaves_one_axis_parameters_to_adam",
    ),
    Fault(
        "warm-up off by one step",
        "optim.py",
        "(_number(peak) - start) * step / ",
        "(_number(peak) - start) * (step + 1.0) / ",
        "test_optim.py::test_warmup_cosine_equals_its_closed_form_with_traced_arguments",
    ),
    Fault(
        "the reference's schedule is not late",
        "optim.py",
        "jnp.maximum(epoch - 1.0, 0.0)",
        "jnp.maximum(epoch, 0.0)",
        "test_optim.py::test_the_references_schedule_is_set_after_each_epoch_and_the_first_runs_at_the_peak",
    ),
    Fault(
        "the flip never happens",
        "augment.py",
        "jnp.where(flipped, cols[::-1], cols)",
        "jnp.where(flipped, cols, cols)",
        "test_augment.py::test_flip_mirrors_the_columns_of_half_of_the_views",
    ),
    Fault(
        "solarize leaves the threshold itself",
        "augment.py",
        "image >= threshold",
        "image > threshold",
        "test_augment.py::test_solarize_equals_pillows_at_and_around_the_threshold",
    ),
    Fault(
        "the hue turns backwards",
        "augment.py",
        "sixths / 6.0 + delta",
        "sixths / 6.0 - delta",
        "test_augment.py::test_hue_equals_colorsys",
    ),
    Fault(
        "luma of permuted channels",
        "augment.py",
        "_LUMA = (0.2989, 0.587, 0.114)",
        "_LUMA = (0.114, 0.587, 0.2989)",
        "test_augment.py::test_blends_equal_pillows",
    ),
    Fault(
        "shrinking without anti-aliasing",
        "augment.py",
        " / jnp.maximum(stretch, 1.0)",
        "",
        "test_augment.py::test_resized_crop_equals_pillows_crop_and_resize",
    ),
    Fault(
        "a crop that reads one pixel beyond its box",
        "augment.py",
        "(pixels < start + extent)",
        "(pixels <= start + extent)",
        "test_augment.py::test_resized_crop_equals_pillows_crop_and_resize",
    ),
    Fault(
        "blends without a clip",
        "augment.py",
        "return jnp.clip(factor * image + (1.0 - factor) * other, 0.0, 1.0)",
        "return factor * image + (1.0 - factor) * other",
        "test_augment.py::test_blends_equal_pillows",
    ),
    Fault(
        "jitter: blends after the hue are made before it again",
        "augment.py",
        "lambda place: place > hue_place",
        "lambda place: place < hue_place",
        "test_augment.py::test_color_jitter_applies_the_four_cores_in_every_order",
    ),
    Fault(
        "two views of one key",
        "augment.py",
        "view(keys[0], images), view(keys[1], images)",
        "view(keys[0], images), view(keys[0], images)",
        "test_augment.py::test_every_image_and_view_has_its_own_draw",
    ),
    Fault(
        "PyTorch's momentum in Flax's BatchNorm",
        "models.py",
        "momentum=0.9, epsilon",
        "momentum=0.1, epsilon",
        "test_models.py::test_running_statistics_move_a_tenth_of_the_way_to_the_batchs",
    ),
    Fault(
        "Flax's biased running variance",
        "models.py",
        "count / max(count - 1, 1)",
        "count / count",
        "test_models.py::test_running_statistics_move_a_tenth_of_the_way_to_the_batchs",
    ),
    Fault(
        "no max-pool after the stem of larger images",
        "models.py",
        "if self.stem_pool:",
        "if False:",
        "test_models.py::test_the_stem_of_larger_images_halves_the_map_twice",
    ),
    Fault(
        "fan-in for fan-out",
        "models.py",
        "shape[0] * shape[1] * shape[3]",
        "shape[0] * shape[1] * shape[2]",
        "test_models.py::test_initial_distributions_are_torchvisions",
    ),
    Fault(
        "Flax's padding of strided convolutions",
        "models.py",
        "conv, self.width, (3, 3), padding=1)",
        'conv, self.width, (3, 3), padding="SAME")',
        "test_models.py::test_a_strided_convolution_pads_one_on_each_side",
    ),
    Fault(
        "mean and standard deviation swapped",
        "models.py",
        "return (to_float(images) - means) / stds",
        "return (to_float(images) - stds) / means",
        "test_models.py::test_normalisation_of_uint8_and_of_floats",
    ),
    Fault(
        "whitening filters transposed",
        "models.py",
        "kernel.transpose(1, 2, 0, 3)",
        "kernel.transpose(2, 1, 0, 3)",
        "test_models.py::test_whitening_stem_whitens_patches",
    ),
    Fault(
        "Muon turns the projector too",
        "optim.py",
        "if p.ndim <= 1 or is_projector:",
        "if p.ndim <= 1:",
        "test_optim.py::test_muon_leaves_the_projector_to_adam_and_treats_the_encoder_as_if_alone",
    ),
    Fault(
        "small images by the nearest pixel",
        "augment.py",
        'jax.image.resize(images, shape, "bilinear")',
        'jax.image.resize(images, shape, "nearest")',
        "test_augment.py::test_resize_images_is_the_resized_crop_of_the_whole",
    ),
    Fault(
        "no expansion, whatever the config says",
        "encoders.py",
        'expand_dim=model.get("expand_dim", 0),',
        "expand_dim=0,",
        "test_config.py::test_every_model_key_reaches_the_model",
    ),
    Fault(
        "the penalty chosen on the test set",
        "probes/ridge.py",
        "max((score(val, candidate)",
        "max((score(test or val, candidate)",
        "test_probes.py::test_ridge_equals_scikit_learn",
    ),
    Fault(
        "the covariance not divided by N, the targets' product is",
        "probes/standardise.py",
        "eigh(columns @ columns.T / count)",
        "eigh(columns @ columns.T)",
        "test_probes.py::test_ridge_equals_scikit_learn",
    ),
    Fault(
        "images without a label count as wrong",
        "probes/scores.py",
        "hits) / jnp.maximum(jnp.sum((labels >= 0)",
        "hits) / jnp.maximum(jnp.sum((labels >= -1)",
        "test_probes.py::test_images_without_a_label_are_left_out",
    ),
    Fault(
        "the -1 mask of the online probe dropped",
        "train_step.py",
        "is_labelled = (labels >= 0)",
        "is_labelled = (labels >= -1)",
        "test_train_step.py::test_images_without_a_label_do_not_count_for_the_probe",
    ),
    Fault(
        "labels of several pairs of views beside the wrong images",
        "train_step.py",
        "jnp.tile(labels, h.shape[0] // labels.shape[0])",
        "jnp.repeat(labels, h.shape[0] // labels.shape[0], total_repeat_length=len(h))",
        "test_train_step.py::test_the_probe_gives_every_pair_of_views_its_image_s_label",
    ),
    Fault(
        "the same views at every step",
        "train_step.py",
        'stream_key(hparams.seed, "views", state.step)',
        'stream_key(hparams.seed, "views", 0)',
        "test_train_step.py::test_a_step_equals_one_written_by_hand",
    ),
    Fault(
        "the loss draws from the views' stream",
        "train_step.py",
        'stream_key(hparams.seed, "loss", state.step)',
        'stream_key(hparams.seed, "views", state.step)',
        "test_train_step.py::test_a_custom_loss_receives_its_own_key_and_the_hparams",
    ),
    Fault(
        "the first view twice",
        "train_step.py",
        "model.apply(variables, view, True)",
        "model.apply(variables, views[0], True)",
        "test_train_step.py::test_a_step_equals_one_written_by_hand",
    ),
    Fault(
        "two global views are paired from one side alone",
        "pairing.py",
        "[(2, a, b) for a, b",
        "[(1, a, b) for a, b",
        "test_pairing.py::test_over_pairs_is_the_mean_of_every_global_view_with_every_other_view",
    ),
    Fault(
        "a global view is part of the mean that it is compared with",
        "pairing.py",
        "(total - view) / (len(global_views) - 1)",
        "total / len(global_views)",
        "test_pairing.py::test_against_mean_is_the_mean_over_views"
        "_of_the_distance_from_the_other_global_ones",
    ),
    Fault(
        "local crops of an image are taken for those of others",
        "pairing.py",
        "stack.reshape(num_images, -1, stack.shape[-1])",
        "stack.reshape(-1, num_images, stack.shape[-1]).swapaxes(0, 1)",
        "test_pairing.py::test_a_lifted_loss_finds_each_images_views_and_hands_on_key_and_hparams",
    ),
    Fault(
        "one local crop more draws all of them anew",
        "augment.py",
        "jax.vmap(crops_of_image)(keys.T,",
        "jax.vmap(crops_of_image)(keys.reshape(len(images), -1),",
        "test_augment.py::test_local_crops_leave_the_other_views_alone_and_lie_image_by_image",
    ),
    Fault(
        "small crops move the running statistics",
        "train_step.py",
        "NUM_GLOBAL = 2",
        "NUM_GLOBAL = 3",
        "test_train_step.py::test_further_views_of_another_size_reach_the_loss_alone",
    ),
    Fault(
        "a step at the next step's rate",
        "train_step.py",
        "_optimizer(optimizer, hparams, state.step)",
        "_optimizer(optimizer, hparams, state.step + 1)",
        "test_train_step.py::test_a_step_equals_one_written_by_hand",
    ),
    Fault(
        "padding rows are trained on",
        "train_step.py",
        "batch_indices[0] >= 0,",
        "batch_indices[0] >= -1,",
        "test_train_step.py::test_scan_equals_the_loop_and_padding_rows_change_nothing",
    ),
    Fault(
        "the statistics of the second view are lost",
        "train_step.py",
        "NUM_GLOBAL = 2",
        "NUM_GLOBAL = 1",
        "test_train_step.py::test_a_step_equals_one_written_by_hand",
    ),
    Fault(
        "the probe's gradient reaches the encoder",
        "train_step.py",
        "return loss, (terms, outputs[0][0], stats)",
        "return loss + jnp.mean(outputs[0][0]), (terms, outputs[0][0], stats)",
        "test_train_step.py::test_a_step_equals_one_written_by_hand",
    ),
    Fault(
        "the filling of the last chunk is kept",
        "representation.py",
        "jax.device_put(chunk))[:count]",
        "jax.device_put(chunk))",
        "test_representation.py::test_features_of_any_number_of_images_are_those_of_each",
    ),
    Fault(
        "moments divided by the momentum",
        "representation.py",
        "zero / (1.0 - (one - zero))",
        "zero / (one - zero)",
        "test_representation.py::test_statistics_are_the_moments_of_the_images_at_the_first_norm",
    ),
    Fault(
        "validation images that the probe was fitted on",
        "representation.py",
        "np.sort(order[:num_val])",
        "np.sort(order[num_val:])",
        "test_representation.py::test_validation_is_drawn_from_everywhere_and_is_disjoint_from_the_rest",
    ),
    Fault(
        "the newest checkpoint dropped when it is not the best",
        "checkpoint.py",
        "preservation_policy.LatestN(2),",
        "",
        "test_checkpoint.py::test_the_latest_two_and_the_best_are_kept_and_the_others_dropped",
    ),
    Fault(
        "a resumed run keeps the row it will write again",
        "metrics.py",
        'row["step"] <= step',
        'row["step"] <= step + 10',
        "test_metrics.py::test_a_resumed_run_drops_the_rows_of_later_steps",
    ),
    Fault(
        "warm-up in epochs where steps are meant",
        "config.py",
        "round(optim.warmup_epochs * steps_per_epoch)",
        "round(optim.warmup_epochs)",
        "test_config.py::test_hparams_are_the_configs_numbers_in_steps",
    ),
    Fault(
        "a warm-up as long as the training refused",
        "config.py",
        "if optim.warmup_epochs > optim.epochs:",
        "if optim.warmup_epochs >= optim.epochs:",
        "test_config.py::test_values_at_the_edge_are_legal",
    ),
    Fault(
        "an epoch in the order of the disk",
        "data/batches.py",
        "jax.random.permutation(key, jnp.arange(num_images, dtype=jnp.int32))",
        "jnp.arange(num_images, dtype=jnp.int32)",
        "test_data.py::test_epoch_order_is_a_function_of_the_key",
    ),
    Fault(
        "labels of other images",
        "data/batches.py",
        "return images[indices], labels[indices]",
        "return images[indices], labels[indices[::-1]]",
        "test_data.py::test_resident_equals_streamed_bit_for_bit",
    ),
    Fault(
        "convolutions with their rows and columns exchanged",
        "interop/torch_names.py",
        "4: (3, 2, 0, 1)",
        "4: (3, 2, 1, 0)",
        "test_interop.py::test_weights_go_back_as_they_came",
    ),
    Fault(
        "eb_jepa's stem padded as everybody's",
        "interop/torch_model.py",
        '"backbone.backbone.", None, 2)',
        '"backbone.backbone.", None, 1)',
        "test_interop.py::test_features_are_pytorchs",
    ),
    Fault(
        "a tensor that ends one element after its storage",
        "interop/torch_pickle.py",
        "last >= len(elements)",
        "last > len(elements)",
        "test_interop.py::test_impossible_tensors_are_damage",
    ),
    Fault(
        "a tensor that repeats its storage without end",
        "interop/torch_pickle.py",
        "if size > len(elements) or (size and last",
        "if (size and last",
        "test_interop.py::test_impossible_tensors_are_damage",
    ),
    Fault(
        "any name of PyTorch's taken",
        "interop/torch_pickle.py",
        "if name not in _KNOWN:",
        'if name not in _KNOWN and not name.startswith("torch "):',
        "test_interop.py::test_a_pickle_is_never_run",
    ),
    Fault(
        "a compressed archive read",
        "interop/torch_file.py",
        "if not is_stored or member.file_size != member.compress_size:",
        "if False:",
        "test_interop.py::test_archives_that_are_no_weights_are_named",
    ),
    Fault(
        "an export of transposed views as they lie in memory",
        "api.py",
        "np.ascontiguousarray(tensor)",
        "tensor",
        "test_convert.py::test_an_imported_folder_serves_as_a_runs_does",
    ),
    Fault(
        "imported weights not found by --init_from",
        "checkpoint.py",
        'if (workdir / "encoder").is_dir():',
        "if False:",
        "test_convert.py::test_training_starts_from_exactly_the_imported_parameters",
    ),
    Fault(
        "scores of raw features without the mean's share of the bias",
        "probes/standardise.py",
        "bias - fit.mean @ kernel",
        "bias",
        "test_probes.py::test_kernel_and_bias_take_raw_features",
    ),
    Fault(
        "the shortcut of few images without the square",
        "probes/standardise.py",
        "jnp.square(singular) / count",
        "singular / count",
        "test_probes.py::test_penalties_make_a_difference_that_scikit_learn_shares",
    ),
    Fault(
        "a penalty twice as large",
        "probes/logistic.py",
        "penalty / 2 * jnp.sum",
        "penalty * jnp.sum",
        "test_probes.py::test_logistic_regression_equals_scikit_learn",
    ),
    Fault(
        "images without a label train the logistic probe",
        "probes/logistic.py",
        "is_labelled * jax.nn.softplus(others)",
        "jax.nn.softplus(others)",
        "test_probes.py::test_images_without_a_label_are_left_out",
    ),
    Fault(
        "the smallest of equally good penalties",
        "probes/logistic.py",
        "if val_acc > best",
        "if val_acc >= best",
        "test_probes.py::test_of_equally_good_penalties_the_largest_wins",
    ),
    Fault(
        "draws of few labels that repeat one another",
        "probes/few_shot.py",
        "jax.random.fold_in(key, number)",
        "key",
        "test_probes.py::test_few_shot_draws_are_of_every_class_and_without_replacement",
    ),
    Fault(
        "a penalty that forgets the number of features",
        "probes/few_shot.py",
        "jnp.maximum(jnp.sum(fit.eigenvalues), 1.0)",
        "1.0",
        "test_probes.py::test_few_shot_penalty_keeps_the_variance_of_a_logit",
    ),
    Fault(
        "references seen twice vote twice",
        "probes/knn.py",
        "best = _merge(*best, queries, *chunk, seen - start)",
        "best = _merge(*best, queries, *chunk, 0)",
        "test_knn.py::test_chunks_change_nothing",
    ),
    Fault(
        "neighbours without a label vote",
        "probes/knn.py",
        "jnp.where((labels >= 0)[None]",
        "jnp.where((labels >= -1)[None]",
        "test_knn.py::test_chunks_change_nothing",
    ),
    Fault(
        "votes weighted by distance the wrong way round",
        "probes/knn.py",
        "(similarities - nearest) / temperature",
        "(nearest - similarities) / temperature",
        "test_knn.py::test_votes_equal_scikit_learn",
    ),
    Fault(
        "RankMe from a Gram matrix",
        "health.py",
        "singular = jnp.linalg.svd(triangle, compute_uv=False)",
        "singular = jnp.sqrt(jnp.abs(jnp.linalg.eigvalsh(triangle @ triangle.T)))",
        "test_health.py::test_rank_me_of_a_rank_is_that_rank",
    ),
    Fault(
        "the effective rank with the mean left in",
        "health.py",
        "    z = _centred(_matrix(z))\n    num_rows, num_dims",
        "    z = _matrix(z)\n    num_rows, num_dims",
        "test_health.py::test_spectrum_equals_numpy",
    ),
    Fault(
        "each embedding is paired with itself",
        "health.py",
        "others = ~jnp.eye(count, dtype=bool)",
        "others = jnp.ones((count, count), bool)",
        "test_health.py::test_uniformity_of_closed_forms",
    ),
    Fault(
        "a representation at zero counts as alive",
        "health.py",
        "std <= 0.01 * size",
        "std < 0.01 * size",
        "test_health.py::test_a_constant_representation_is_dead_and_of_rank_one",
    ),
    Fault(
        "an image is its own nearest neighbour",
        "report/pictures.py",
        "cosines[np.arange(len(queries)), queries] = -np.inf",
        "cosines[np.arange(len(queries)), queries] = np.inf",
        "test_report.py::test_neighbours_are_the_nearest_by_cosine",
    ),
    Fault(
        "neighbours by the dot product, without the cosine's norm",
        "report/pictures.py",
        "unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-30)",
        "unit = h",
        "test_report.py::test_neighbours_are_the_nearest_by_cosine",
    ),
    Fault(
        "the report trusts the text of files",
        "report/page.py",
        'html.escape("".join(letters))',
        '"".join(letters)',
        "test_report.py::test_what_files_say_is_shown_and_never_run",
    ),
    Fault(
        "a confusion matrix in percent of its columns",
        "report/image_plots.py",
        "counts.sum(axis=1, keepdims=True)",
        "counts.sum(axis=0, keepdims=True)",
        "test_report.py::test_percentages_of_a_confusion_matrix_add_to_a_hundred",
    ),
    Fault(
        "above its floors by the lowest of them",
        "report/sections.py",
        '_, highest = max(floors, key=lambda floor: floor[1]["acc"])',
        '_, highest = min(floors, key=lambda floor: floor[1]["acc"])',
        "test_report.py::test_the_headline_is_the_best_known_probe_above_its_highest_floor",
    ),
    Fault(
        "a floor's features are the encoder's",
        "evaluation.py",
        'encoders["untrained"] = (apply, untrained)',
        'encoders["untrained"] = (apply, variables)',
        "test_evaluation.py::test_every_accuracy_has_its_interval_and_its_floors",
    ),
    Fault(
        "the confusion matrix is of validation images",
        "evaluation.py",
        'split = "test" if "test" in features else "val"',
        'split = "val"',
        "test_evaluation.py::test_confusion_and_classes_belong_to_the_linear_probe_on_test",
    ),
    Fault(
        "chance is of the rarest class",
        "evaluation.py",
        "commonest = np.argmax(",
        "commonest = np.argmin(",
        "test_evaluation.py::test_chance_is_the_commonest_training_class",
    ),
    Fault(
        "few-shot intervals as if the spread were known",
        "evaluation.py",
        "scipy.special.stdtrit(_NUM_DRAWS - 1, 0.975)",
        "scipy.special.ndtri(0.975)",
        "test_evaluation.py::test_few_shot_figures_are_means_over_draws_with_students_interval",
    ),
    Fault(
        "the statistics' share of the gap is the classifier's",
        "evaluation.py",
        "(clean - online, fitted - clean)",
        "(fitted - clean, clean - online)",
        "test_evaluation.py::test_the_gap_between_online_and_offline_is_shared_out",
    ),
    Fault(
        "the SGD probe's momentum is not Nesterov's",
        "sgd_probe.py",
        "nesterov=True",
        "nesterov=False",
        "test_sgd_probe.py::test_whole_batches_follow_nesterov_with_a_cosine",
    ),
    Fault(
        "the SGD probe trains on validation labels too",
        "sgd_probe.py",
        "np.flatnonzero(labels >= 0)",
        "np.arange(len(labels))",
        "test_sgd_probe.py::test_images_without_a_label_are_never_seen",
    ),
    Fault(
        "fine-tuning with the head's rate for the encoder",
        "finetuning.py",
        "(name, getattr(rates, name), state.params[name], updates[name])",
        "(name, rates.head, state.params[name], updates[name])",
        "test_finetuning.py::test_steps_are_those_of_nesterovs_sgd_with_two_rates",
    ),
    Fault(
        "the probe's bias lost at the start of fine-tuning",
        "finetuning.py",
        'params = {"encoder": variables["params"], "head": head}',
        'params = {"encoder": variables["params"], "head": {**head, "bias": 0 * head["bias"]}}',
        "test_finetuning.py::test_before_its_first_step_it_is_the_probe",
    ),
    Fault(
        "fine-tuning under the head of the untrained network's probe",
        "finetune.py",
        "self._best(seed, pretrained, probe, images, labels, steps)",
        "self._best(seed, pretrained, floor, images, labels, steps)",
        "test_finetune.py::test_both_start_from_probes_and_the_pretrained_one_is_the_frozen_probe",
    ),
    Fault(
        "a subset of labels drawn anew for every share",
        "finetuning.py",
        "np.random.default_rng(seed).permutation(np.sort(rows))",
        "np.random.default_rng(int(100 * share) + seed).permutation(np.sort(rows))",
        "test_finetuning.py::test_subsets_are_balanced_nested_and_of_their_seed",
    ),
    Fault(
        "fine-tuning's rates chosen by the test set",
        "finetune.py",
        'score = self._score(tuned, ("val",))["val"]',
        'score = self._score(tuned, ("test",))["test"]',
        "test_finetune.py::test_val_chooses_and_test_never_does",
    ),
    Fault(
        "the watch looks at the second view",
        "watch.py",
        "self._views_of(index)[0]",
        "self._views_of(index)[1]",
        "test_watch.py::test_figures_are_those_of_whole_chunks_of_first_views",
    ),
    Fault(
        "a term's gradient without its weight",
        "watch.py",
        "norms[name] = weight * float(norm)",
        "norms[name] = float(norm)",
        "test_watch.py::test_gradient_norms_are_those_of_weighted_terms_by_the_encoder_alone",
    ),
    Fault(
        "a rank that fell in z alone is a collapse",
        "watch.py",
        'fell_below(_LOW_RANK_Z, "z_rank_me") and fell_below(_LOW_RANK_H, "h_rank_me")',
        'fell_below(_LOW_RANK_Z, "z_rank_me")',
        "test_watch.py::test_figures_have_the_right_name",
    ),
    Fault(
        "the balance in the wrong unit",
        "watch.py",
        "cov / paper_cov_coeff(num_dims)}",
        "cov / num_dims}",
        "test_watch.py::test_rapids_loss_is_out_of_balance_and_the_line_says_how_to_mend_it",
    ),
    Fault(
        "a flag for versions of XLA that may not know it",
        "device.py",
        "lowest <= version < above",
        "lowest <= version",
        "test_device.py::test_xla_flags_keep_what_was_there_and_unknown_versions_get_none",
    ),
    Fault(
        "a person's own XLA flag overruled",
        "device.py",
        " and _XLA_FLAG not in flags",
        "",
        "test_device.py::test_xla_flags_keep_what_was_there_and_unknown_versions_get_none",
    ),
    Fault(
        "float32 where a flag asked for bfloat16",
        "config_flags.py",
        " is jnp.bfloat16 and not asked:",
        " is jnp.bfloat16:",
        "test_device.py::test_bfloat16_is_not_computed_in_on_a_cpu_unless_a_flag_asks",
    ),
    Fault(
        "a config of the package goes before one's own of that name",
        "configs.py",
        "else [path, shipped]",
        "else [shipped, path]",
        "test_packaging.py::test_a_file_of_ones_own_goes_first",
    ),
    Fault(
        "a path out of one's folder finds a config of the package",
        "configs.py",
        '[path] if ".." in path.parts else [path, shipped]',
        "[path, shipped]",
        "test_packaging.py::test_what_is_no_files_name_comes_back",
    ),
    Fault(
        "a config found by its name loses what follows the colon",
        "config_flags.py",
        'f"{path}{colon}{argument}"',
        'f"{path}"',
        "test_packaging.py::test_a_name_keeps_its_argument",
    ),
    Fault(
        "a bottleneck that strides on its first 1x1 convolution",
        "models.py",
        "conv(self.width, (1, 1))(x)))\n"
        "        x = nn.relu(norm()(conv(self.width, (3, 3), strides=self.stride, padding=1)",
        "conv(self.width, (1, 1), strides=self.stride)(x)))\n"
        "        x = nn.relu(norm()(conv(self.width, (3, 3), padding=1)",
        "test_models.py::test_a_bottleneck_is_three_convolutions_of_which_the_3x3_strides",
    ),
    Fault(
        "parameters of a bottleneck counted as a basic block's",
        "encoders.py",
        "    if expansion == 1:\n",
        "    if True:\n",
        "test_config.py::test_parameters_are_counted_without_building_any",
    ),
    Fault(
        "a blur that repeats the edge's own pixel",
        "augment.py",
        "weights(2 * last - col - row)",
        "weights(2 * last + 1 - col - row)",
        "test_augment.py::test_gaussian_blur_equals_scipys_on_a_mirrored_image",
    ),
    Fault(
        "a blur of what has been solarized",
        "augment.py",
        "jax.random.fold_in(key, 4), image,",
        "jax.random.fold_in(key, 4), solarize(image, 128 / 255),",
        "test_augment.py::test_a_blur_comes_after_the_greyscale_and_before_solarize",
    ),
    Fault(
        "a blur in the config that no view has",
        "plan.py",
        "blur_kernel=blur_kernel(",
        "blur_kernel=0 * blur_kernel(",
        "test_train.py::test_the_configs_strengths_make_the_views",
    ),
    Fault(
        "views with a blur and without one in one program of a sweep",
        "sweep/cells.py",
        '"has_blur": has_blur(self.config)',
        '"has_blur": True',
        "test_sweep.py::test_points_of_numbers_share_a_program_and_points_of_shapes_do_not",
    ),
    Fault(
        "remat that keeps everything",
        "models.py",
        "static_argnums=(2,)) if self.remat else make_block",
        "static_argnums=(2,)) if False else make_block",
        "test_models.py::test_remat_computes_the_same_and_keeps_less_for_the_backward_pass",
    ),
    Fault(
        "FLOPs of a convolution with one side of its kernel",
        "benchmark/roofline.py",
        "return self.out_side**2 * self.kernel**2 *",
        "return self.out_side**2 * self.kernel *",
        "test_benchmark_roofline.py::test_multiply_adds_are_those_of_the_traced_network",
    ),
    Fault(
        "the ratio to PyTorch upside down",
        "benchmark/peer.py",
        'speeds["ours"] / speeds["theirs"]',
        'speeds["theirs"] / speeds["ours"]',
        "test_benchmark.py::test_pairs_alternate_and_give_the_ratio_of_medians",
    ),
    Fault(
        "a log-uniform range drawn uniformly",
        "sweep/axes.py",
        "        if self.is_log:\n",
        "        if False:\n",
        "test_sweep.py::test_draws_lie_in_their_range_by_their_law_and_more_of_them_add_points",
    ),
    Fault(
        "the worst of a rung go on",
        "sweep/result.py",
        "key=rank, reverse=True",
        "key=rank",
        "test_sweep.py::test_halving_ends_with_one_point_and_costs_less_than_all",
    ),
    Fault(
        "every seed of a point is the first",
        "sweep/cells.py",
        "config.meta.seed = seed",
        "config.meta.seed = 0",
        "test_sweep.py::test_a_cell_is_the_single_run_of_its_config",
    ),
    Fault(
        "a diverged cell trains on",
        "sweep/tracks.py",
        "if bad := what_is_bad(metrics, self.step, self.plan.fault_places):",
        "if False and (bad := what_is_bad(metrics, self.step, self.plan.fault_places)):",
        "test_sweep.py::test_a_diverged_point_is_a_row_that_says_when_and_which_term",
    ),
    Fault(
        "lengths share steps at which their rates differ",
        "sweep/shared.py",
        "same = int(differs[0]) if len(differs) else num_steps",
        "same = num_steps",
        "test_sweep.py::test_rates_of_their_own_share_no_steps",
    ),
    Fault(
        "the interval of a mean is its standard error",
        "report/sweep_page.py",
        "    return quantile * figure",
        "    return figure",
        "test_sweep.py::test_the_interval_of_a_mean_is_students",
    ),
    Fault(
        "an epoch's evaluation left out of a budget",
        "pace.py",
        "* (cost.epoch + cost.per_epoch) - cost.per_epoch)",
        "* (cost.epoch + cost.per_epoch))",
        "test_pace.py::test_epochs_fill_the_time_to_a_step_and_never_pass_it",
    ),
    Fault(
        "the first training images in place of drawn ones",
        "data/dataset.py",
        "np.sort(np.random.default_rng(0).permutation(num_images)[:num_train])",
        "np.arange(num_train)",
        "test_data.py::test_fewer_training_images_are_a_part_of_more_with_their_labels",
    ),
    Fault(
        "a strength of the views that the step does not see",
        "train_step.py",
        "augment_fn(views_key, images, **hparams.augment)",
        "augment_fn(views_key, images)",
        "test_train.py::test_the_configs_strengths_make_the_views",
    ),
    Fault(
        "a checkpoint whose arrays are not compared",
        "checkpoint.py",
        "if _of_array(array) != digests",
        "if False and _of_array(array) != digests",
        "test_checkpoint.py::test_a_turned_bit_of_a_large_array_is_noticed_wherever_it_is",
    ),
    Fault(
        "what a failed write has left stays in the metrics",
        "metrics.py",
        "self._file.truncate(self._size)  # what a failed attempt has left",
        "self._size = self._file.seek(0, os.SEEK_END)",
        "test_metrics.py::test_rows_that_find_no_room_wait_and_leave_no_half_of_one",
    ),
    Fault(
        "a dead process holds its folder where there are no locks",
        "lock.py",
        "not _is_alive(holder",
        "_is_alive(holder",
        "test_lock.py::test_without_locks_a_dead_one_is_stale",
    ),
    Fault(
        "back at the last state, with the rate as it was",
        "loop.py",
        "np.float32(self.plan.config.optim.lr / 2**back_offs)",
        "np.float32(self.plan.config.optim.lr)",
        "test_train.py::test_back_off_goes_back_halves_the_rate_and_is_the_same_after_a_stop",
    ),
    Fault(
        "a gradient that is not finite under another's name",
        "train_step.py",
        "return [views, *gradients, *parameters,",
        "return [views, *parameters, *gradients,",
        "test_train_step.py::test_one_gradient_that_is_not_finite_is_named",
    ),
    Fault(
        "statistics of microbatches are summed, not averaged",
        "train_step.py",
        "return total / num_pieces",
        "return total",
        "test_train_step.py::test_microbatches_normalise_by_their_own_moments"
        "_and_the_loss_sees_the_whole_batch",
    ),
    Fault(
        "the second view's gradient is dropped with microbatches",
        "train_step.py",
        "zip(views, pulls, strict=True):",
        "zip(views[:1], pulls[:1], strict=True):",
        "test_train_step.py::test_microbatches_change_nothing"
        "_of_an_encoder_without_batch_statistics",
    ),
    Fault(
        "the last line names this process, not the lost one",
        "last_words.py",
        "if int(number) != process_id]",
        "]",
        "test_distributed.py::test_the_last_line_names_the_lost_process",
    ),
    Fault(
        "a batch is checked for its devices alone",
        "distributed.py",
        "parts = num_devices * microbatches",
        "parts = num_devices",
        "test_distributed.py::test_a_batch_that_does_not_divide_is_refused",
    ),
    Fault(
        "any SLURM job is taken for several processes",
        "distributed.py",
        "int(count) > 1 for count",
        "int(count) > 0 for count",
        "test_distributed.py::test_a_process_of_its_own_joins_nothing",
    ),
    Fault(
        "any image stands in for a broken one",
        "data/records.py",
        "np.flatnonzero(self._labels == self._labels[position])",
        "np.arange(len(self._reader))",
        "test_stream.py::test_for_a_broken_image_the_next_good_one_with_its_label_stands_in",
    ),
    Fault(
        "a streamed batch begins a place too late",
        "data/workers.py",
        "batch[start:end] = pixels[: end - start]",
        "batch[start:end] = np.roll(pixels[: end - start], 1, axis=0)",
        "test_stream.py::test_batches_are_those_asked_for_whatever_their_size_and_number",
    ),
]


def check_that_faults_fit() -> None:
    """Exits unless every fault's text occurs exactly once: one that fits nowhere proves nothing."""
    for fault in FAULTS:
        count = (ROOT / "jepa_jax" / fault.file).read_text().count(fault.old)
        if count != 1:
            sys.exit(f"{fault.file} has {fault.old!r} {count} times, not once: {fault.what}")


def run_tests(tests: Sequence[str], fault: Fault | None) -> tuple[int, str]:
    """pytest's exit status and output for some tests over a copy of everything."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("jepa_jax", "tests", "configs", "benchmarks", "examples"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if fault:
            path = copy / "jepa_jax" / fault.file
            path.write_text(path.read_text().replace(fault.old, fault.new))
        # Quick compiling matters here, and quick programs do not.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        try:
            result = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-x",
                    "-q",
                    "-n0",
                    "-p",
                    "no:cacheprovider",
                    *(f"tests/{test}" for test in tests),
                ],
                cwd=copy,
                env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": folder},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return -1, f"no end after {TIMEOUT_SECONDS} s"
    return result.returncode, result.stdout + result.stderr


def outcome(tests: Sequence[str], fault: Fault | None) -> str:
    """'caught' or 'passes'; in capitals what should not be."""
    code, output = run_tests(tests, fault)
    if fault is None and code == 0:
        return "passes"
    if fault is not None and code == 1 and "FAILED " in output:
        return "caught"
    last = " ".join(output.strip().splitlines()[-1:])
    return f"{'MISSED' if fault else 'FAILS'}: pytest ended with {code} ({last})"


def chosen(words: list[str]) -> list[Fault]:
    """Those of the files that are named, all if none is; of 'K/N' every N-th, from number K on."""
    shares = [word for word in words if re.fullmatch(r"\d+/\d+", word)]
    files = [word for word in words if word not in shares]
    faults = [f for f in FAULTS if not files or any(word in f.file for word in files)]
    for first, every in (map(int, share.split("/")) for share in shares):
        faults = faults[first::every]
    return faults


def main(words: list[str]) -> None:
    check_that_faults_fit()
    faults = chosen(words)
    # All tests without a fault first, file by file: one that always fails would catch everything.
    of_file: dict[str, list[str]] = {}
    for test in dict.fromkeys(fault.test for fault in faults):
        of_file.setdefault(test.partition("::")[0], []).append(test)
    runs = [(tests, None) for tests in of_file.values()]
    runs += [([fault.test], fault) for fault in faults]
    wrong = 0
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ThreadPoolExecutor(NUM_WORKERS) as pool,
    ):
        # Programs that a fault leaves alone are compiled once.
        os.environ["JEPA_JAX_TEST_CACHE"] = cache
        outcomes = pool.map(outcome, *zip(*runs, strict=True))
        for (tests, fault), found in zip(runs, outcomes, strict=True):
            no_fault = (tests[0].partition("::")[0], "no fault")
            file, what = (fault.file, fault.what) if fault else no_fault
            print(f"{file:<22} {what:<56} {found}", flush=True)
            wrong += found not in ("caught", "passes")
    print(f"{len(faults)} faults, {wrong} lines that are not as they should be")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
