"""Pretraining of DeepSeek-V3-style language models with Multi-Token Prediction under pipeline parallelism.

Folders and the direction of imports: cli -> trainer -> {pipeline, parallel, data, checkpoint, monitor} ->
{model, precision}. ``config``, ``config_checks``, ``errors`` and ``typed_config`` import nothing from the package's folders.
"""

__version__ = "0.1.0"
