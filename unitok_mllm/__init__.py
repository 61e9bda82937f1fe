"""UniTok: one LLM that reads images and draws them. Importing the package registers it with the Auto classes.

If transformers has been imported before, the classes are registered at once. Otherwise they are registered when
transformers or a module of this package (except the command line) is imported, so that `unitok-mllm --help` needs
neither torch nor transformers.
"""

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .registration import (
        UniTokConfig,
        UniTokDepthConfig,
        UniTokImageProcessor,
        UniTokImageProcessorPil,
        UniTokImageStreamer,
        UniTokMLLMConfig,
        UniTokMLLMForConditionalGeneration,
        UniTokMLLMModel,
        UniTokMLLMProcessor,
        UniTokModel,
        UniTokMultiCodebookQuantizer,
        UniTokVisionConfig,
        UniTokVisionModel,
    )

__version__ = "0.1.0"
# modules that import neither torch nor transformers
LIGHT = ("cli", "devices", "guard", "inference", "interruption", "outputs", "sheet", "typer_apps")

__all__ = [
    "UniTokConfig",
    "UniTokDepthConfig",
    "UniTokImageProcessor",
    "UniTokImageProcessorPil",
    "UniTokImageStreamer",
    "UniTokMLLMConfig",
    "UniTokMLLMForConditionalGeneration",
    "UniTokMLLMModel",
    "UniTokMLLMProcessor",
    "UniTokModel",
    "UniTokMultiCodebookQuantizer",
    "UniTokVisionConfig",
    "UniTokVisionModel",
]


def _register() -> ModuleType:
    return importlib.import_module(".registration", __name__)


class _RegisterAfterFirstImport:  # a finder without its base class, whose module takes long to import
    """Register the classes as soon as transformers, or a module that imports it, has been loaded."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        own = fullname.startswith(f"{__name__}.") and fullname.rpartition(".")[2] not in LIGHT
        if not own and fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register
        return spec


def _starts_command_line() -> bool:
    """Return whether this process is `unitok-mllm` or `python -m unitok_mllm.cli`."""
    words = sys.orig_argv[1:3]
    return words == ["-m", f"{__name__}.cli"] or [os.path.basename(word) for word in words[:1]] == ["unitok-mllm"]


if _starts_command_line():
    from .interruption import end_imports_at_once

    end_imports_at_once()
if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterFirstImport())


def __getattr__(name: str) -> type:
    """Import the public classes when the first of them is used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_register(), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
