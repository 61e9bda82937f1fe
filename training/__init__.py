"""Training of the visual tokenizer (on accelerate) and of the unified MLLM (on transformers' `Trainer`)."""

import logging
import os
import sys
import warnings

from unitok_mllm.interruption import end_imports_at_once


OF_NO_USE = (  # messages at import, or from each worker, that users can do nothing about
    "is an Enum subclass and is now natively supported",  # torch, of torchao's
    "Setting accelerator to CPU. If you have GPU",  # DeepSpeed
    "Detected no triton, on systems without Triton certain kernels will not work",  # torchao
    "Skipping import of cpp extensions",  # torchao
    "This DataLoader will create",
    "`is_gradient_checkpointing` is deprecated",  # transformers, of peft's
    "`torch.distributed.*` is deprecated",  # torch, of DeepSpeed's
    "Grad strides do not match bucket view strides",  # torch, of convolutions on a CPU
)


def is_of_use(record: logging.LogRecord) -> bool:
    """Return whether users can do something about a library's log record."""
    return not any(text in record.getMessage() for text in OF_NO_USE)


def quiet_libraries() -> None:
    """Silence warnings and logs that users can do nothing about. Call it in every process before other imports."""
    for name in ("torch.utils._pytree", "DeepSpeed", "torchao", "torchao.kernel.intmm"):
        logging.getLogger(name).addFilter(is_of_use)
    for text in OF_NO_USE:
        warnings.filterwarnings("ignore", message=text)
    os.environ.setdefault("LOGURU_LEVEL", "INFO")  # lmms-eval's debug lines


quiet_libraries()
if sys.argv[0] == "-m":  # `python -m` starts a script
    end_imports_at_once()
