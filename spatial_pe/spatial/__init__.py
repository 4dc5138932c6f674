# SPDX-License-Identifier: Apache-2.0
"""Does it see space better? Studies of position encodings, and published spatial benchmarks."""
