"""Small matrices: more than one thread only adds scheduling, and changes the order of sums."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
