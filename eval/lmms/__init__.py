"""A plug-in of lmms-eval: the model `unitok_mllm` and the task `easy_vqa`.

`python -m eval.vqa` uses it. lmms-eval's own command finds it from this repository's root by an environment variable:

    LMMS_EVAL_PLUGINS=eval.lmms python -m lmms_eval --model unitok_mllm --model_args pretrained=FOLDER --tasks easy_vqa
"""
