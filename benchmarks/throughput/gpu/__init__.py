# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.gpu_session runs, in the order in which it happens.

machine.py   the device, versions, which tools are there
cases.py     which shapes, in which order, and the inputs of one
variants.py  what is compared
warm.py      compiles ahead, in many processes
check.py     every kernel of a backend against float64, in a process of its own
measure.py   the process that measures; timing.py: how; layers.py: layers of real towers
state.py     the JSON that a step leaves, rewritten after every row
watch.py     runs all of these, ends what hangs, starts again without it
report.py    from the JSON to the report
model.py     how long all of it should take; dry.py: what can be checked without a GPU
"""
