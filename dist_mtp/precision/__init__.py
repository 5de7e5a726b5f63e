"""How numbers are held and multiplied: linears and grouped linears whose weight gradients can wait.

Imports nothing else from the package. Lower precisions are further implementations of the same two layers.
"""
