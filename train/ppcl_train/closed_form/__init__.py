"""Solutions without a step of training, one file each.

`least_squares`, `surgery` and `cka` take tensors and return tensors. `block_statistics` collects what they
are given of a block, and `text_runs` fits the maps of text runs; both run blocks of the teacher.
"""
