"""Training of the visual tokenizer and of the unified MLLM, on the Hugging Face Trainer."""

import logging
import warnings


# what libraries say at import or once for each worker, and no user can act on
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="This DataLoader will create")
