"""What is asked and read: concepts, questions and texts, ours and released, and the invented subject."""
