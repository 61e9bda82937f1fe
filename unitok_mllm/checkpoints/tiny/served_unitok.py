"""The installed package's classes, for programs that know the model by the `auto_map` of this folder alone."""

from unitok_mllm import (
    UniTokImageProcessor,
    UniTokMLLMConfig,
    UniTokMLLMForConditionalGeneration,
    UniTokMLLMModel,
    UniTokMLLMProcessor,
)


__all__ = [
    "UniTokImageProcessor",
    "UniTokMLLMConfig",
    "UniTokMLLMForConditionalGeneration",
    "UniTokMLLMModel",
    "UniTokMLLMProcessor",
]
