"""The parts of ``planning.py``: ``steps`` simulates schedules, ``growth`` times the planner, ``actions`` times the runtime.

Only what the ranks of ``actions`` run needs torch.
"""
