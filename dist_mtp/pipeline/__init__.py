"""Where the model is computed: units, stages, schedules and the plan that ties them together.

``table``, ``placement``, ``schedules``, ``lowering``, ``devices``, ``sizes``, ``costs``, ``experts``, ``memory``,
``partition``, ``simulate``, ``bounds`` and ``plan`` are pure and never import torch; ``stage`` and ``runtime`` execute a plan with torch.
"""
