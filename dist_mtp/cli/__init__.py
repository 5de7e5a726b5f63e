"""The command line: one short file per verb of ``dist-mtp``, and the composition of configurations.

Nothing here imports torch before a configuration is known to be good.
"""
