"""How numbers are held and multiplied: linears, grouped linears and SwiGLU, whose weight gradients can wait.

``fp8/`` is what those layers do under ``precision=fp8``. Imports nothing else from the package but ``dist_mtp.errors`` and names.
"""
