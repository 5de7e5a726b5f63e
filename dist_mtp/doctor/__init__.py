"""``dist-mtp doctor``: checks of this machine and of the hosts of a run, each a small function that returns findings.

Functions take what they judge (a command's output, a number) as arguments, so that they can be tested on any machine; what
asks the machine stands beside them. May import ``config``, ``errors`` and ``launch``; never torch, which a process of its
own tries out.
"""
