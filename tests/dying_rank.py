"""``python -m bllkern`` for torchrun, where the first attempt loses one rank: arguments RANK STEP, then the command's."""

import os
import signal
import sys

from bllkern.cli import main
from bllkern.cli.block_parallel import RankTraining

rank, step, *arguments = sys.argv[1:]
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
train_epoch = RankTraining.train_epoch


def train_until_death(self, progress):
    def done():
        progress()
        if self.blocks.steps == int(step) and os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return train_epoch(self, done)


if attempt == "0":
    RankTraining.train_epoch = train_until_death
if os.environ["RANK"] == "0":
    print(f"attempt {attempt}", flush=True)
sys.exit(main(arguments))
