"""Sweeps: which points there are, how each becomes a run in a process of its own, and which of them need not run again.

Hydra's sweepers choose the points and Hydra's launchers run them. ``cli`` imports this package; it composes points with
``cli.compose``, and tells ``monitor.sweep_points`` what became of them.
"""
