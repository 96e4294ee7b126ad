from io import BytesIO

import numpy as np
from matplotlib.image import imread

from distrl.tracking.curves import picture

RISING = [(20, 0.1), (40, 0.2), (60, 0.4)]
FALLING = [(20, -1.0), (40, -2.0), (60, -2.5)]


def size_of(found):
    image = imread(BytesIO(picture(found, "a run")))
    assert np.unique(image).size > 2  # something is drawn
    return image.shape[:2]


def test_measured_views_are_a_second_row():
    plain = {"encoder/next_item": RISING, "val/ndcg_at_10": RISING, "system/wait_share": RISING}
    views = {
        f"views/{kind}/{name}": points
        for kind in ("data", "learned")
        for name, points in {"alignment": RISING, "uniformity": FALLING, "norm": RISING}.items()
    }
    height, width = size_of(plain)
    assert size_of(plain | views) == (2 * height, width)
