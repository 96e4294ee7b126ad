r"""Train CE-SASRec, the control that contrastive methods have to beat.

    python jobs/train_sasrec.py configs/sasrec/beauty.yaml section.key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train_sasrec.py configs/sasrec/beauty.yaml

Without RAY_ADDRESS a Ray is started on this machine.
"""

from jobs.command import run
from jobs.train import train

if __name__ == "__main__":
    run(lambda: train("sasrec", __doc__))
