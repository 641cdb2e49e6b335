"""Which files can it open? Tokenizers, weight files, Hugging Face and LLaVA folders, and the writers of each."""
