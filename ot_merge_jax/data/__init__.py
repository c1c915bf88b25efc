"""Texts: documents, chats, tokenizers, batches, and which rows of two models correspond."""
