"""Where the images come from (`sources`), how they become batches (`splits`), and the embedded sample itself."""
