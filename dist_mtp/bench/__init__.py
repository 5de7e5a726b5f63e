"""Measurements of parts of training on one device, without ranks and data: what ``dist-mtp bench`` runs.

May import everything but ``dist_mtp.cli`` and ``dist_mtp.parallel``; imported by ``dist_mtp.cli`` and ``benchmarks/`` only.
"""
