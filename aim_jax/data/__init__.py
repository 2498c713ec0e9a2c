"""The stream: benchmark folders and generated text, memory, batches."""
