"""Is B better than A? Paired seeds, equal time, validation images: a verdict in words."""

SIDES = ("A", "B")
# Keys that say where things lie on a machine: no part of a result.
PLACES = ("meta.model_folder", "data.data_dir")
# What decides which images figures are of.
JUDGED_ON = ("data.dataset", "data.num_train", "data.num_val")
