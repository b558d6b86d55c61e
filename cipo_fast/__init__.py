"""A trainer for CIPO on token trees. Start at train.py; the algorithm is in cipo/, the kernels in cipo_kernels."""
