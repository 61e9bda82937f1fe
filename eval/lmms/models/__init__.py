"""What lmms-eval looks up: the name of a module here, and its class."""

AVAILABLE_MODELS = {"unitok_mllm": "UniTokMLLM"}
