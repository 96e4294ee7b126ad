r"""Train GRU4Rec with a full-softmax cross entropy: the control of SRA-CL on a recurrent encoder.

    python jobs/train_gru4rec.py configs/gru4rec/beauty.yaml section.key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train_gru4rec.py configs/gru4rec/beauty.yaml

Without RAY_ADDRESS a Ray is started on this machine.
"""

from jobs.command import run
from jobs.train import train

if __name__ == "__main__":
    run(lambda: train("gru4rec", __doc__))
