# SPDX-License-Identifier: Apache-2.0
"""Tasks for lmms-eval: a yaml file says where the data is, the module of its name what is asked and how it scores."""
