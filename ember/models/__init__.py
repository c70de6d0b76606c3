"""What a language model does: where its weights come from, loading, activations, scores of texts and options."""
