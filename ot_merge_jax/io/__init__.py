"""Files: safetensors, Hugging Face folders, run folders."""
