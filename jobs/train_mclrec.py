r"""Train MCLRec: an encoder and two learned augmenters, trained in alternation.

    python jobs/train_mclrec.py configs/mclrec/beauty.yaml section.key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train_mclrec.py configs/mclrec/beauty.yaml

Without RAY_ADDRESS a Ray is started on this machine.
"""

from jobs.command import run
from jobs.train import train

if __name__ == "__main__":
    run(lambda: train("mclrec", __doc__))
