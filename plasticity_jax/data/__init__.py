"""What the model reads: sources, documents, tokenizer, packed records, batches; tasks and probe sets."""
