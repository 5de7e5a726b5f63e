"""Ranks and what they share: the process mesh and the DeepSpeed engine.

Imports ``dist_mtp.model``, ``config`` and ``errors`` only; the trainer joins it with ``dist_mtp.pipeline``.
"""
