# SPDX-License-Identifier: Apache-2.0
"""Parts of benchmarks.gpu_session, in the order in which they run.

machine.py   the device, versions, available tools
cases.py     shapes, in order (their inputs: spatial_pe/lab/bench/cases.py)
variants.py  the compared functions
warm.py      compiles ahead, in many processes
check.py     every kernel of a backend against float64, in a separate process
measure.py   the measuring process; layers.py: layers of real towers
state.py     the JSON of a step, rewritten after every row
watch.py     runs all of these, kills what hangs, and restarts without it
report.py    maps the JSON to the report
model.py     model of the expected times; dry.py: checks without a GPU
"""
