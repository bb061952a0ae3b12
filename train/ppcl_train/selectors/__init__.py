"""Ways to choose what is removed or replaced, one file each.

`cost_table` and `eq5` choose intervals for the pipeline and leave them as `selection` describes. `gates`, `greedy` and
`uniform` choose for the methods that the pipeline is compared with.
"""
