"""Starting ranks: on this machine, on several over ssh, by DeepSpeed's launcher, or as a Slurm job.

May import ``config``, ``launcher_checks``, ``errors``, ``signals``, ``data``, ``run_folder``, ``same_run``, ``monitor`` and,
for a rank in the launcher's own process, ``train``; torch only where ranks are started on this machine. ``cli`` and ``sweep``
import it; ranks import only ``facts``, what must be alike on all nodes.
"""
