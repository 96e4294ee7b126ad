r"""Train SRA-CL: a base method, and contrasts with what is like a prefix by its texts.

    python jobs/train_sracl.py configs/sracl/beauty.yaml section.key=value ...
    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train_sracl.py configs/sracl/beauty.yaml

The store needs a table of neighbors (jobs/embed.py, then jobs/retrieve.py), which `data.neighbors`
names. Without RAY_ADDRESS a Ray is started on this machine.
"""

from jobs.command import run
from jobs.train import train

if __name__ == "__main__":
    run(lambda: train("sracl", __doc__))
