"""What a language model grades: features, open answers and coherence, through any chat-completions endpoint."""
