"""Register the classes with transformers' Auto classes. The package imports this module when it is needed."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_unitok import UniTokConfig, UniTokDepthConfig, UniTokMLLMConfig, UniTokVisionConfig
from .image_processing_unitok import UniTokImageProcessor, UniTokImageProcessorPil
from .modeling_unitok import UniTokModel, UniTokVisionModel
from .modeling_unitok_mllm import UniTokMLLMForConditionalGeneration, UniTokMLLMModel
from .processing_unitok import UniTokMLLMProcessor
from .quantization_unitok import UniTokMultiCodebookQuantizer
from .streaming_unitok import UniTokImageStreamer


for _config, _model in (
    (UniTokConfig, UniTokModel),
    (UniTokVisionConfig, UniTokVisionModel),
    (UniTokMLLMConfig, UniTokMLLMModel),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoImageProcessor.register(
        _config, image_processor_classes={"torchvision": UniTokImageProcessor, "pil": UniTokImageProcessorPil}
    )
# what `save_pretrained` writes loads elsewhere with `trust_remote_code=True`, without this package
for _class, _auto_class in (
    (UniTokConfig, "AutoConfig"),
    (UniTokVisionConfig, "AutoConfig"),
    (UniTokMLLMConfig, "AutoConfig"),
    (UniTokModel, "AutoModel"),
    (UniTokVisionModel, "AutoModel"),
    (UniTokMLLMModel, "AutoModel"),
    (UniTokMLLMForConditionalGeneration, "AutoModelForImageTextToText"),
    (UniTokImageProcessor, "AutoImageProcessor"),
    (UniTokImageProcessorPil, "AutoImageProcessor"),
    (UniTokMLLMProcessor, "AutoProcessor"),
):
    _class.register_for_auto_class(_auto_class)
AutoModelForImageTextToText.register(UniTokMLLMConfig, UniTokMLLMForConditionalGeneration)
AutoModelForMultimodalLM.register(UniTokMLLMConfig, UniTokMLLMForConditionalGeneration)
AutoProcessor.register(UniTokMLLMConfig, UniTokMLLMProcessor)

# The library's Trainer shifts labels for label smoothing by this table of names alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[UniTokMLLMConfig.model_type] = UniTokMLLMForConditionalGeneration.__name__

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
