r"""Train LACLRec: first an augmenter that mends sequences, then a recommender that it helps.

    python jobs/train_laclrec.py configs/laclrec/beauty.yaml section.key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train_laclrec.py configs/laclrec/beauty.yaml

Without RAY_ADDRESS a Ray is started on this machine.
"""

from jobs.command import run
from jobs.train import train

if __name__ == "__main__":
    run(lambda: train("laclrec", __doc__))
