"""What comes back: attacks by fine-tuning, how much they regain, and knowledge that was taught and erased again."""
