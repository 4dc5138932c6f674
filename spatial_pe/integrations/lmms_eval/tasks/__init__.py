# SPDX-License-Identifier: Apache-2.0
"""Tasks for lmms-eval: a yaml file names the data, the module of the same name has the prompt and the score."""
