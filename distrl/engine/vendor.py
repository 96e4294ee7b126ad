"""DeepSpeed, imported late and quietly."""

import importlib
import logging
import os
import warnings
from types import ModuleType


def load_deepspeed(device_type: str) -> ModuleType:
    """The deepspeed package, ready for devices of one type.

    Imported at first use, because it takes seconds. The name of the accelerator must be set before
    that: DeepSpeed would otherwise take a GPU that the run was told to leave alone.

    Args:
        device_type: "cpu" or "cuda".
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # On CPUs DeepSpeed compiles a shared-memory kernel that only its inference code uses: half a
    # minute with a compiler, an exception without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renames two collectives that DeepSpeed calls at every step.
    for renamed in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{renamed}.*", category=FutureWarning)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed calls SGD an untested optimizer at every start; the parity tests test it."""
    return "untested optimizer" not in record.getMessage()
