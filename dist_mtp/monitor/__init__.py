"""What leaves a run: metrics file, TensorBoard, console, plots, end report and ``result.json``.

Only rank 0 writes. May import ``config``, ``errors`` and the pure planning modules of ``pipeline``; the trainer and ``cli``
import it, ``model`` never does.
"""
