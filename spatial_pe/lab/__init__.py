# SPDX-License-Identifier: Apache-2.0
"""What measures and teaches: demo, benchmarks, the study of encodings, caption benchmarks. Only ``cli`` and the
programs under benchmarks/ import it."""
