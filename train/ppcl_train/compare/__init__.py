"""Comparison with other ways to make a model smaller.

`methods` lists them. `whole_blocks` and `width_alone` hold all but ours; `entry` is what each gets, `training` how each
is trained, and `harness` makes, judges and reports all of them.
"""
