"""Starting ranks: on this machine, on several over ssh, by DeepSpeed's launcher, or as a Slurm job.

May import ``config``, ``errors``, ``data``, ``run_folder`` and ``monitor``; torch only where ranks are started on this
machine. ``cli`` imports it; ranks import only ``facts``, what must be alike on all nodes.
"""
