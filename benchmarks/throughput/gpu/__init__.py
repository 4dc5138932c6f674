# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.throughput.attention_gpu is made of, in the order in which it happens.

cases.py     which shapes, in which order, and the inputs of one
variants.py  what is compared
warm.py      compiles ahead, in many processes
measure.py   the process that measures; timing.py: how; state.py: the JSON that it leaves
report.py    from the JSON to the table and the plot
dry.py       what can be checked of all this without a GPU
"""
