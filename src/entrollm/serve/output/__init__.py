"""What a model's text means: reasoning, text and calls of tools, one format of calls per file."""
