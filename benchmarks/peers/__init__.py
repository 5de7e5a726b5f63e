"""Other pipelines, run on the same work as dist_mtp's: what ``schedules_asleep.py`` and ``pipeline_peers.py`` share.

``workload``, ``cuts`` and ``results`` need no torch; ``measuring`` times contenders on all ranks; ``ours``,
``deepspeed_pipelines`` and ``torch_pipelines`` build them, each from its own package; ``sleeping`` and ``layers`` are what
they run; ``asleep`` and ``computing`` are what each rank does.
"""
