"""Training of the visual tokenizer and of the unified MLLM, on the Hugging Face Trainer."""
