"""What leaves a run: metrics file, TensorBoard, console, plots, end report and ``result.json``.

Only rank 0 writes. May import ``config`` and ``errors``; the trainer and ``cli`` import it, ``model`` never does.
"""
