"""The program ``ppcl``: a file a command group.

main.py     the program, its errors and its exit status
inspect.py  ``info`` and ``plan``: what a checkpoint can do
sample.py   ``sample``, ``eval`` and ``demo``: run a checkpoint on its task
report.py   ``report``: one page of the results in a folder
options.py  options that several commands share
values.py   how their values are read
starting.py how a command starts soon
output.py   files that appear only when they are complete, and tables

Installed packages add further groups (``ppcl train``, ``ppcl bench``) through the entry points ``ppcl.commands``.
"""
