from typing import Any

import numpy as np

def resample(
    pixels: np.ndarray[Any, np.dtype[np.uint8]],
    height: int,
    width: int,
    out: np.ndarray[Any, np.dtype[np.uint8]],
    out_height: int,
    out_width: int,
    filter_number: int,
    /,
) -> None: ...
