"""Hydra configuration groups, installed as the package ``dist_mtp.conf``."""
