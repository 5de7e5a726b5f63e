"""What is computed: modules and losses of the trunk and of Multi-Token Prediction. Knows nothing of ranks.

Imports only ``dist_mtp.precision``, ``dist_mtp.config`` and ``dist_mtp.recompute``.

Shape suffixes (``scores_TE`` is [T, E]):
    B rows of a microbatch        T positions of a row (or of all rows, where rows are flattened)
    D model width                 V vocabulary             H attention heads
    E routed experts              K experts per token      G expert groups
    R rotary width of a head      N head width without rotation
MTP depth is ``depth`` (1..num_depths; 0 is the main head).
"""
