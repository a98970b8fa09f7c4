"""Folders of Hugging Face models: weights in safetensors files, and what a model is loaded with."""
