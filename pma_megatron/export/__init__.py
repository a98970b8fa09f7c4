"""Averages as what others load: Hugging Face safetensors, one declarative map per model family."""
