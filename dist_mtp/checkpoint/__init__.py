"""Checkpoints that any layout can load: safetensors shards and a JSON manifest, hashed and committed by one rename.

``format``, ``merge`` (pure) <- ``files``, ``folder``, ``manifest`` <- ``save``, ``load``; no process group, no pickle.
Imported by the trainer and by ``interop``; imports nothing from dist_mtp but ``errors``.
"""
