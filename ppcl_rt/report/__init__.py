"""One page of whatever results lie in a folder: ``ppcl report``, and the end of a training run.

parts.py        what a page is made of: sections of tables, curves and pictures
stored.py       what every results file is read as
folder.py       the files of a folder, each read by the first kind that it fits
evaluations.py  ``ppcl eval``
comparisons.py  ``ppcl train compare``, subsets of students, other tables of rows
runs.py         logs, settings and pictures of training runs
gpu.py          parts of a GPU run, times of blocks
plans.py        plans of a pluggable checkpoint
sheets.py       contact sheets
curves.py       curves as SVG
page.py         the page: `page.write_report`
"""
