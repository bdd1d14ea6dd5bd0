"""Train or resume the model of TinyWorld's second edition.

python training/train_world2.py FOLDER [seconds] [stages]      e.g.  runs/world2 3600 vae,painter   or   runs/world2 900 judge

Checkpoints lie in FOLDER; where there are none, training starts from the weights in this folder."""
import sys
from pathlib import Path

import torch

from parallel_rescale.world.model import main

torch.set_num_threads(1)
folder, seconds, stages = (sys.argv[1:] + [None, None, None][len(sys.argv) - 1:])[:3]
main(folder, stages=(stages or "vae,painter").split(","), start=Path(__file__).parent, limit_seconds=float(seconds) if seconds else None)
