r"""Train CL4SRec: SASRec with a contrast of two augmented views.

    python jobs/train_cl4srec.py configs/cl4srec/beauty.yaml section.key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train_cl4srec.py configs/cl4srec/beauty.yaml

Without RAY_ADDRESS a Ray is started on this machine.
"""

from jobs.command import run
from jobs.train import train

if __name__ == "__main__":
    run(lambda: train("cl4srec", __doc__))
