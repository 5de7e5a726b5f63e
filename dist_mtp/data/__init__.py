"""From text to packed rows: sources -> tokenizers -> corpus (on disk, verified) -> packing, in the order of ``order``.

Everything here is a pure function of the configuration and the text, so each rank computes its own batches.
May import ``config`` and ``errors`` only; ``batch`` alone imports torch, nothing knows of ranks or DeepSpeed.
"""
